"""Stage `distill`: the training of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.models.manifest import TeacherManifest
from cdm.params import load
from cdm.system.launcher import launch
from stages.common import (
    CHECKPOINTS,
    PARAMS,
    LatentsFolder,
    PromptsFolder,
    StudentFolder,
    TeacherFile,
    run,
    stage,
)


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    latents: LatentsFolder = Path("data/latents"),
    pairs: Annotated[Path, typer.Option(help="Pairs that the stage `latents` wrote.")] = Path("data/pairs"),
    student: StudentFolder = Path("models/student"),
    log: Annotated[Path, typer.Option(help="CSV to write, a row a round.")] = Path("logs/distill.csv"),
    pictures: Annotated[Path, typer.Option(help="Folder of pictures to write while training.")] = Path(
        "logs/pictures"
    ),
    timing: Annotated[Path, typer.Option(help="File of times to write.")] = Path("logs/timing.json"),
) -> None:
    """Distil the student; an interrupted run is taken up where it stopped."""
    launch("stages.distill", load(PARAMS).runtime.accelerate_config)
    from cdm.training.inputs import Inputs
    from cdm.training.loop import distill
    from cdm.training.watch import Places

    with stage(
        "seed",
        "prompts.embed",
        "prompts.max_sequence_length",
        "prompts.precision",
        "schedule",
        "distill",
        files=[log, timing],
        folders=[student, pictures],
    ) as params:
        inputs = Inputs.gather(params, TeacherManifest.read(teacher), prompts, latents=latents, pairs=pairs)
        places = Places(pictures, timing, CHECKPOINTS.with_name("trackers"))
        distill(params, inputs, checkpoints=CHECKPOINTS, student=student, log=log, places=places)


if __name__ == "__main__":
    run(main)
