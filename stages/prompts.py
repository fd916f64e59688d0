"""Stage `prompts`: the training and evaluation prompts, split and encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.data import prompts
from cdm.models.manifest import TeacherManifest
from stages.common import TeacherFile, run, stage


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/prompts"),
) -> None:
    """Read the prompt lists, split them into training and evaluation, and encode them."""
    with stage("seed", "prompts", folders=[out]) as params:
        manifest = TeacherManifest.read(teacher)
        report = prompts.build(params.prompts, manifest, out, seed=params.seed, runtime=params.runtime)
    print("\n".join(report.lines()))


if __name__ == "__main__":
    run(main)
