"""What cells are made from: a record of each drawing and of each prompt set's measuring, with hashes of all that lies
outside. A cell runs again when its record changes, and for no other reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cdm import limits, measures
from cdm.data.prompt_lists import read_prompts
from cdm.errors import CdmError
from cdm.external import record_evaluation
from cdm.judging import models
from cdm.judging.design import JudgedSet, Judging
from cdm.judging.places import Places
from cdm.models.metric_models import users
from cdm.models.student import Model
from cdm.params import Evaluate, MetricModels
from cdm.preflight import check_models, problems_of_evaluation, problems_of_reals, real_size, too_few_pictures
from cdm.system.files import Memory, digest_of, read_json, write_json
from cdm.system.places import check_folder
from cdm.system.records import parse_record


@dataclass(frozen=True)
class Drawing:
    """What the pictures of a cell are drawn from: the content of cells/draw/ROW-SET.json."""

    row: str
    set: str
    family: str
    model: str
    """Hash of what it draws with."""
    latent_shape: Annotated[list[int], Field(min_length=3, max_length=3)]
    sigmas: list[float]
    """Noise levels of the evaluations, before the model's shift."""
    guidance_scale: float
    precision: str
    max_sequence_length: int | None
    prompts_sha256: str
    per_prompt: int
    seed: int
    pictures: int

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def evaluations(self) -> int:
        """Of the transformer for a picture: a guided step costs two."""
        return self.steps if self.guidance_scale == 1 else 2 * self.steps

    @property
    def metadata(self) -> dict[str, Any]:
        """What makes its samples the same samples."""
        facts = asdict(self)
        for name in ("row", "pictures"):
            del facts[name]
        return facts | {"steps": self.steps, "evaluations": self.evaluations}

    @classmethod
    def read(cls, path: Path) -> Drawing:
        """The record at `path`. Raises CdmError if it is missing or damaged."""
        try:
            return parse_record(cls, path.read_bytes())
        except (OSError, ValueError):
            raise CdmError(f"{path}: missing or damaged: run the stage `resolve` of judging/ again") from None


def read_texts(path: Path) -> list[str]:
    """The prompts of a set. Raises CdmError if the file is missing or damaged."""
    texts = read_json(path)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise CdmError(f"{path}: missing or damaged: run the stage `resolve` of judging/ again")
    return texts


def check(judging: Judging, places: Places) -> None:
    """Raises CdmError with a line for everything that is named and not there, and that no stage could do without.

    Nothing is downloaded, and nothing takes long.
    """
    problems = list(_problems(judging))
    if problems:
        raise CdmError("\n".join(problems))
    for folder in ("cells", "samples", "pictures", "results", "page"):
        check_folder(places.root / folder)


def _problems(judging: Judging) -> Iterator[str]:
    for row in judging.rows:
        if models.is_missing(judging.models[row]):
            source = judging.models[row].source
            yield f"models.{row}.source: {source}: no such folder or file, and not a hub id (org/name)"
    for name in judging.sets:
        chosen = judging.prompts[name]
        missing = [path for path in chosen.files if not Path(path).exists()]
        yield from (f"prompts.{name}.files: {path}: no such file" for path in missing)
        problems = list(problems_of_evaluation(judging.evaluation(name), _remedy(judging, name)))
        if not (missing or problems):
            problems = list(_problems_of_prompts(chosen, judging.evaluation(name)))
        yield from (_in_words_of(name, problem) for problem in problems)


def _remedy(judging: Judging, name: str) -> str:
    """How to get the models of the measures of a prompt set."""
    usual, models = MetricModels(), judging.metric_models
    needed = users(judging.evaluation(name))
    options = [f"--metric {metric}" for metric in judging.prompts[name].metrics]
    options += [
        f"--model {key}={getattr(models, key)}" for key in needed if getattr(models, key) != getattr(usual, key)
    ]
    return f"get them with `cdm fetch {' '.join(options)}`, or leave the measures out"


def _problems_of_prompts(chosen: JudgedSet, evaluation: Evaluate) -> Iterator[str]:
    """What is wrong with the prompts of a set, for its measures; keys are those of a params file of the pipeline."""
    try:
        texts = prompts_of(chosen)
    except CdmError as error:
        yield f"evaluate.files: {error}"
        return
    users = any(measure.uses_neighbours for measure in measures.chosen(chosen.metrics))
    if users or chosen.judge is not None:
        yield from too_few_pictures(evaluation, len(texts), chosen.per_prompt)
    if chosen.real is not None:
        yield from problems_of_reals(evaluation, texts, chosen.per_prompt)


def _in_words_of(name: str, problem: str) -> str:
    """A problem of an evaluation with the keys of the prompt set `name`."""
    words = {
        "evaluate.models.": "metric_models.",
        "evaluate.models: ": "metric_models: ",
        "evaluate.scorers: ": "scorers: ",
        "evaluate.": f"prompts.{name}.",
        "latents.per_prompt": "per_prompt",
        "prompts.eval_count": "count",
        "compare with the teacher": "compare with the reference's pictures",
    }
    for theirs, ours in words.items():
        problem = problem.replace(theirs, ours)
    return problem


def prompts_of(chosen: JudgedSet) -> list[str]:
    """The prompts of a set. Raises CdmError for files that cannot be used, or that hold too few."""
    texts, _ = read_prompts(chosen.files, chosen.column)
    if not texts:
        raise CdmError("no prompt in them")
    if chosen.count is not None and len(texts) < chosen.count:
        raise CdmError(f"they hold {len(texts):,} prompts, but count is {chosen.count:,}")
    texts = texts[: chosen.count]
    if len(texts) * chosen.per_prompt > limits.PROMPTS:
        raise CdmError(f"{len(texts):,} prompts of {chosen.per_prompt:,} pictures are too many")
    return texts


def resolve(judging: Judging, places: Places, memory: Memory) -> dict[str, Model]:
    """Find every model and write the records of all cells below `places.cells`; the models by row. Raises CdmError.

    Models of a hub are downloaded once, after all else has been checked.
    """
    check(judging, places)
    found = {
        row: _named(f"models.{row}", lambda row=row: models.find(judging.models[row])) for row in judging.rows
    }
    for row, model in found.items():
        _named(f"models.{row}", lambda row=row, model=model: models.check(judging.models[row], model))
    shapes = {
        row: _named(
            f"models.{row}", lambda row=row, model=model: models.latent_shape(judging.models[row], model)
        )
        for row, model in found.items()
    }
    _check_sizes(judging, {row: _size(model, shapes[row]) for row, model in found.items()})
    digests = {row: models.digest(model, memory) for row, model in found.items()}
    shutil.rmtree(places.cells, ignore_errors=True)
    for name in judging.sets:
        chosen, texts = judging.prompts[name], prompts_of(judging.prompts[name])
        _write(places.prompts(name), texts)
        inputs = places.measuring(name)
        evaluation = judging.evaluation(name)
        record_evaluation(evaluation, inputs, memory)
        _check_measuring(name, evaluation, inputs, memory)
        settings = evaluation.model_dump(mode="json", include={"neighbours", "metrics", "resamples", "scorers"})
        _write(inputs, {"settings": settings | {"seed": judging.seed}, "files": read_json(inputs)})
        for row, model in found.items():
            judged = judging.models[row]
            drawing = Drawing(
                row=row,
                set=name,
                family=model.family.name,
                model=digests[row],
                latent_shape=list(shapes[row]),
                sigmas=judged.levels,
                guidance_scale=judged.guidance_scale,
                precision=judging.precision_of(row),
                max_sequence_length=models.text_tokens(judged, model),
                prompts_sha256=digest_of(texts),
                per_prompt=chosen.per_prompt,
                seed=judging.seed,
                pictures=chosen.pictures,
            )
            _write(places.drawing(row, name), asdict(drawing))
    return found


def _size(model: Model, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of its pictures."""
    pixels = model.family.pixels_per_latent(model.base)
    return latent_shape[1] * pixels, latent_shape[2] * pixels


def _check_sizes(judging: Judging, sizes: dict[str, tuple[int, int]]) -> None:
    """Raises CdmError where a judge would see pictures of different sizes: of models, or real ones."""
    problems = []
    for name in judging.sets:
        if judging.prompts[name].judge is None:
            continue
        expected, owner = real_size(judging.evaluation(name)), f"the real pictures of {name} have"
        if expected is None:
            expected, owner = sizes[judging.reference], f"{judging.reference} draws"
        problems += [
            f"models.{row}: draws {size[0]} x {size[1]} pixels, and {owner} {expected[0]} x {expected[1]}: the judge of"
            f" {name} needs one size: set resolution"
            for row, size in sizes.items()
            if size != expected
        ]
    if problems:
        raise CdmError("\n".join(problems))


def _check_measuring(name: str, evaluation: Evaluate, inputs: Path, memory: Memory) -> None:
    """Loads the models of a set's measures once, so that one that is broken is said before anything is drawn.

    `inputs` has the hashes of their files; `memory` those that were in order. Raises CdmError.
    """
    known: dict[str, str] = memory.values.setdefault("judging", {})
    key = digest_of([read_json(inputs), evaluation.metrics])
    if known.get(name) == key:
        return
    try:
        check_models(evaluation)
    except CdmError as error:
        raise CdmError("\n".join(_in_words_of(name, line) for line in str(error).splitlines())) from None
    known[name] = key


def _named(key: str, find: Any) -> Any:
    """What `find` returns; a CdmError that it raises names the key."""
    try:
        return find()
    except CdmError as error:
        raise CdmError("\n".join(f"{key}: {line}" for line in str(error).splitlines())) from None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value, lists_in_a_line=True)
