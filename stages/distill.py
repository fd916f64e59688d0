"""Stage `distill`: the training of the student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cdm.models.hub import TeacherManifest
from cdm.params import load
from cdm.system.launcher import launch
from stages.common import PARAMS, PromptsFolder, StudentFolder, TeacherFile, run, stage


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
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

    with stage("seed", "prompts", "schedule", "distill") as params:
        inputs = Inputs.gather(params, TeacherManifest.read(teacher), prompts)
        checkpoints = Path(os.environ.get("DVC_ROOT", ".")) / "checkpoints"  # kept, also by runs in a copy
        places = Places(pictures, timing, checkpoints.with_name("trackers"))
        distill(params, inputs, checkpoints=checkpoints, student=student, log=log, places=places)


if __name__ == "__main__":
    run(main)
