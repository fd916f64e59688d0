"""Stage `latents`: the teacher's full-length samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.data.sampling import cache_teacher_latents, cache_training_pairs
from cdm.models.manifest import TeacherManifest
from cdm.params import load
from cdm.system.launcher import launch
from stages.common import PARAMS, PromptsFolder, TeacherFile, run, stage


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    out: Annotated[Path, typer.Option(help="Store to write, of the evaluation prompts.")] = Path(
        "data/latents"
    ),
    pairs: Annotated[Path, typer.Option(help="Store to write, of training prompts.")] = Path("data/pairs"),
    none: Annotated[
        Path, typer.Option(help="Empty folder to make: what a training without a probe reads.")
    ] = Path("data/none"),
) -> None:
    """Draw the teacher's full-length samples, with the noise that they came from."""
    launch("stages.latents", load(PARAMS).runtime.accelerate_config)
    with stage("seed", "teacher", "latents", folders=[out, pairs, none]) as params:
        manifest = TeacherManifest.read(teacher)
        for cache, store in ((cache_teacher_latents, out), (cache_training_pairs, pairs)):
            cache(
                params.latents,
                manifest,
                prompts,
                store,
                seed=params.seed,
                guidance_scale=params.teacher.guidance_scale,
                runtime=params.runtime,
            )
        none.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    run(main)
