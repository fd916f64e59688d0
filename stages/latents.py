"""Stage `latents`: the teacher's full-length samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.hub import TeacherManifest
from cdm.launcher import launch
from cdm.params import load
from cdm.sampling import cache_teacher_latents
from stages.common import PARAMS, PromptsFolder, TeacherFile, run, stage


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    out: Annotated[Path, typer.Option(help="Store to write.")] = Path("data/latents"),
) -> None:
    """Draw the teacher's full-length samples of the evaluation prompts, with the noise that they came from."""
    launch("stages.latents", load(PARAMS).runtime.accelerate_config)
    with stage("seed", "teacher", "latents") as params:
        cache_teacher_latents(params, TeacherManifest.read(teacher), prompts, out)


if __name__ == "__main__":
    run(main)
