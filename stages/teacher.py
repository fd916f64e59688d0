"""Stage `teacher`: which model is distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.models import hub
from stages.common import run, stage


def main(out: Annotated[Path, typer.Option(help="File to write.")] = Path("data/teacher.json")) -> None:
    """Find the teacher (a folder, or a model on a hub), check it, and write down which one it is."""
    with stage("teacher") as params:
        named = params.teacher
        teacher = hub.describe(named.family, named.source, named.revision, named.resolution)
        teacher.write(out)
    at = f" at {teacher.revision}" if teacher.revision else ""
    print(f"{teacher.source}{at}: {teacher.parameters:,} parameters, latents {teacher.latent_shape}")


if __name__ == "__main__":
    run(main)
