"""Stage `sample`: samples of student and teacher at each number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.data.sampling import draw_samples
from cdm.models.manifest import TeacherManifest
from cdm.params import load
from cdm.system.launcher import launch
from stages.common import (
    PARAMS,
    LatentsFolder,
    PromptsFolder,
    StudentFolder,
    TeacherFile,
    give_back_checkpoints,
    run,
    stage,
)


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    student: StudentFolder = Path("models/student"),
    prompts: PromptsFolder = Path("data/prompts"),
    latents: LatentsFolder = Path("data/latents"),
    out: Annotated[Path, typer.Option(help="Folder of sample sets to write.")] = Path("data/samples"),
) -> None:
    """Draw from student and teacher at each number of steps, on the same noise."""
    launch("stages.sample", load(PARAMS).runtime.accelerate_config)
    with stage("sample", folders=[out]) as params:
        manifest = TeacherManifest.read(teacher)
        draw_samples(params.sample, manifest, student, prompts, latents, out, runtime=params.runtime)
        give_back_checkpoints(student)


if __name__ == "__main__":
    run(main)
