"""Stage `evaluate`: measures the samples of student and teacher, and writes figures, plots and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.data.prompt_set import PromptSet
from cdm.evaluation.results import summary, write_results
from cdm.experiments.headline import training_seconds, write_headline
from cdm.models.manifest import TeacherManifest
from cdm.planning.forwards import forwards_of_training
from cdm.system.circumstances import Circumstances
from stages.common import CHECKPOINTS, PromptsFolder, TeacherFile, run, stage


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    samples: Annotated[Path, typer.Option(help="What the stage `sample` wrote.")] = Path("data/samples"),
    log: Annotated[Path, typer.Option(help="The training log, a CSV file.")] = Path("logs/distill.csv"),
    timing: Annotated[Path, typer.Option(help="The times of the training.")] = Path("logs/timing.json"),
    metrics: Annotated[Path, typer.Option(help="File of figures to write.")] = Path("metrics/quality.json"),
    headline: Annotated[Path, typer.Option(help="File to write of what DVC's tables show of them.")] = Path(
        "metrics/headline.json"
    ),
    curves: Annotated[Path, typer.Option(help="CSV to write of what DVC's plots show of them.")] = Path(
        "metrics/quality.csv"
    ),
    plots: Annotated[Path, typer.Option(help="Folder of pictures to write.")] = Path("plots"),
    report: Annotated[Path, typer.Option(help="Folder of the report to write.")] = Path("report"),
) -> None:
    """Measure the samples, draw the pictures, write the report."""
    with stage(  # the report shows every parameter
        "seed",
        "teacher",
        "prompts",
        "latents",
        "schedule",
        "distill",
        "sample",
        "evaluate",
        files=[metrics, headline, curves],
        folders=[plots, report],
    ) as params:
        manifest, seconds = TeacherManifest.read(teacher), training_seconds(timing)
        results = write_results(
            params,
            manifest,
            PromptSet(prompts / "eval").texts,
            samples,
            log,
            metrics,
            plots,
            report,
            CHECKPOINTS / "scores",
            timing=timing,
            now=Circumstances.now(params.runtime.device),
        )
        forwards = forwards_of_training(params.distill, params.schedule, manifest.shift).equivalents
        write_headline(metrics, headline, curves, seconds=seconds, forwards=forwards)
    print(f"{summary(results)}\n{report / 'index.html'}: the whole report")


if __name__ == "__main__":
    run(main)
