"""Stage of a cell: trains one student, of one method and one seed, and measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from comparison.design import CELLS, Table
from stages.common import PARAMS, LatentsFolder, PromptsFolder, TeacherFile, run


def main(
    table: Annotated[Table, typer.Argument(help="The table that it belongs to.")],
    method: Annotated[str, typer.Argument(help="The method, as comparison/params.yaml names it.")],
    seed: Annotated[int, typer.Argument(help="The seed of its training.")],
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    latents: LatentsFolder = Path("data/latents"),
) -> None:
    """Train a student, draw from it, and write down what it scores; an interrupted cell is taken up again."""
    import torch

    from cdm.models.manifest import TeacherManifest
    from comparison import design
    from comparison.results import RESULTS, Result, result_path
    from comparison.run import RUNS, cell_params, measured, trained, training_code

    folder, manifest = RUNS / table / f"{method}-{seed}", TeacherManifest.read(teacher)
    with cell_params(CELLS / table / f"{method}.yaml", PARAMS, seed) as (params, settings):
        student = trained(params, manifest, prompts, folder)
        evaluation = measured(params, manifest, student, prompts, latents, folder)
    Result(
        method=method,
        seed=seed,
        settings=settings,
        code=training_code(manifest.family),
        torch=torch.__version__,
        student_updates=design.student_updates(params),
        forward_equivalents=design.forward_equivalents(params, manifest.shift),
        guidance=design.guidance_strength(params, manifest.shift),
        rows=evaluation.quality["student"],
    ).write(result_path(RESULTS, table, method, seed))


if __name__ == "__main__":
    run(main)
