"""Running a cell: training, sampling and measuring, by the functions that the stages call, in a folder of the cell.

A folder of runs/ holds the student, its log, and while they are needed the checkpoints and the samples. What is done is
not done again: training resumes from its checkpoint, and a student that has been trained with the same parameters, data
and code is not trained twice, so that only drawing and measuring are repeated when a cell is run once more.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdm.data.prompt_set import PromptSet
from cdm.data.sampling import draw_samples
from cdm.errors import CdmError
from cdm.evaluation.features import load_extractor
from cdm.evaluation.quality import Evaluation, evaluate
from cdm.evaluation.samples import open_samples, read_real
from cdm.models.manifest import TeacherManifest
from cdm.params import Params, changed, load, parse
from cdm.preflight import check_paths
from cdm.system import host
from cdm.system.files import sha256
from cdm.system.provenance import code_digest
from cdm.training.identity import fingerprint
from cdm.training.inputs import Inputs
from cdm.training.loop import distill

RUNS = Path("comparison/runs")
PAIRS = Path("comparison/pairs")
"""Pairs for regression terms: drawn once, for all cells."""
TRAINED = "trained.txt"
"""Names the training whose student is in the folder."""


@contextmanager
def cell_params(path: Path, root: Path, seed: int | None = None) -> Iterator[tuple[Params, str]]:
    """The parameters of a file of cells/ with the `runtime` of the params file `root`, and the file's hash.

    `seed` replaces the file's. Raises CdmError where the files cannot be used, and at the end where the file has
    changed since: DVC would take the results for those of the new one.
    """
    if not path.is_file():
        raise CdmError(f"{path}: missing: it is written by `dvc repro resolve`")
    before = sha256(path)
    runtime = load(root).runtime.model_dump(mode="json")
    values = {**load(path).model_dump(mode="json"), "runtime": runtime}
    params = parse(values if seed is None else changed(values, {"seed": seed}))
    check_paths(params)
    host.prepare(params.runtime.threads)
    yield params, before
    if sha256(path) != before:
        raise CdmError(
            f"{path} changed while the cell ran, so its result belongs to the old values: run it again"
        )


def trained(params: Params, teacher: TeacherManifest, prompts: Path, folder: Path) -> Path:
    """The folder of the student of `params`, which is trained if `folder` does not hold it yet."""
    inputs = Inputs.gather(params, teacher, prompts, pairs=PAIRS)
    name = fingerprint(params, inputs)
    student, marker = folder / "student", folder / TRAINED
    if student.is_dir() and marker.is_file() and marker.read_text() == name:
        print(f"{student}: trained already")
        return student
    marker.unlink(missing_ok=True)
    distill(params, inputs, checkpoints=folder / "checkpoints", student=student, log=folder / "log.csv")
    marker.write_text(name)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return student


def measured(
    params: Params, teacher: TeacherManifest, student: Path, prompts: Path, latents: Path, folder: Path
) -> Evaluation:
    """How `student` and the teacher score at the numbers of steps of `params`; the samples are removed again."""
    samples = folder / "samples"
    draw_samples(params.sample, teacher, student, prompts, latents, samples, runtime=params.runtime)
    texts = PromptSet(prompts / "eval").texts
    real = None if params.evaluate.real is None else read_real(Path(params.evaluate.real), texts)
    extractor = load_extractor(params.evaluate.judge)
    drawn = open_samples(params.sample, params.latents, samples, texts)
    evaluation = evaluate(drawn, real, extractor, neighbours=params.evaluate.neighbours, seed=params.seed)
    shutil.rmtree(samples)
    return evaluation


def training_code(family: str) -> str:
    """Fingerprint of the code that a training's result depends on."""
    return code_digest("distill", family)[:16]
