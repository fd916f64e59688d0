"""Stage `pairs`: pairs of noise and teacher's samples for regression terms, drawn once for all cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from comparison.design import CELLS
from stages.common import PARAMS, PromptsFolder, TeacherFile, run


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    out: Annotated[Path, typer.Option(help="Store to write.")] = Path("comparison/pairs"),
) -> None:
    """Draw as many of the teacher's samples of training prompts, with their noise, as any method asks for."""
    from cdm.data.sampling import cache_training_pairs
    from cdm.models.manifest import TeacherManifest
    from comparison.run import cell_params

    with cell_params(CELLS / "pairs.yaml", PARAMS) as (params, _):
        cache_training_pairs(
            params.latents,
            TeacherManifest.read(teacher),
            prompts,
            out,
            seed=params.seed,
            guidance_scale=params.teacher.guidance_scale,
            runtime=params.runtime,
        )


if __name__ == "__main__":
    run(main)
