"""Stage `teacher`: records which model is distilled, and the hashes of the other external inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.external import record_evaluation, record_prompts, record_teacher
from cdm.models.metric_models import without_missing
from cdm.preflight import check_lists, check_models_once, use_of
from cdm.system.files import Memory
from cdm.system.lock import is_unchanged
from stages.common import REPOSITORY, StudentFolder, TeacherFile, give_back_checkpoints, run, stage


def main(
    out: TeacherFile = Path("data/teacher.json"),
    prompts: Annotated[Path, typer.Option(help="File to write, of the prompt lists.")] = Path(
        "data/inputs/prompts.json"
    ),
    evaluation: Annotated[Path, typer.Option(help="File to write, of what an evaluation reads.")] = Path(
        "data/inputs/evaluation.json"
    ),
    student: StudentFolder = Path("models/student"),
) -> None:
    """Find the teacher (a folder, or a model on a hub), check it, write down which one it is, and hash the rest."""
    with (
        stage("teacher", "prompts", "evaluate", files=[out, prompts, evaluation]) as params,
        Memory.kept(REPOSITORY / "data/.hashes.json") as memory,
    ):
        check_lists(params)  # what the stages `prompts` and `evaluate` would refuse
        teacher = record_teacher(params.teacher, out, memory, use_of(params))
        record_prompts(params.prompts, prompts, memory)
        record_evaluation(params.evaluate, evaluation, memory)
        check_models_once(params.evaluate, evaluation, memory)
    give_back_checkpoints(student)  # for where DVC had no reason to run the stage `sample`
    revision = f" at {teacher.revision}" if teacher.revision else ""
    for name, problem in without_missing(params.evaluate)[1].items():
        print(f"without {name}: {problem}: `cdm fetch params.yaml` gets models")
    print(f"{teacher.source}{revision}: {teacher.parameters:,} parameters, latents {teacher.latent_shape}")
    if is_unchanged():
        print(
            "nothing has changed since the last run: the same parameters, code and inputs, and so the same results"
        )


if __name__ == "__main__":
    run(main)
