"""Stage `teacher` of the comparison: measures the teacher, once for all cells."""

from __future__ import annotations

from pathlib import Path

from comparison.design import CELLS
from stages.common import PARAMS, LatentsFolder, PromptsFolder, TeacherFile, run


def main(
    teacher: TeacherFile = Path("data/teacher.json"),
    prompts: PromptsFolder = Path("data/prompts"),
    latents: LatentsFolder = Path("data/latents"),
) -> None:
    """Measure the teacher with guidance, and without it: in the place of a student."""
    from cdm.models.manifest import TeacherManifest
    from comparison.results import RESULTS, TeacherResult
    from comparison.run import RUNS, cell_params, measured

    manifest = TeacherManifest.read(teacher)
    with cell_params(CELLS / "teacher.yaml", PARAMS) as (params, settings):
        evaluation = measured(params, manifest, manifest.folder(), prompts, latents, RUNS / "teacher")
    quality = evaluation.quality
    result = TeacherResult(settings, quality["teacher"], quality["student"], evaluation.floor)
    result.write(RESULTS / "teacher.json")


if __name__ == "__main__":
    run(main)
