"""Measuring the pictures of a cell: the measures that its prompt set names, with what tells errors of differences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.evaluation.features import load_extractor
from cdm.evaluation.metrics import measure_chosen
from cdm.evaluation.quality import evaluate
from cdm.evaluation.samples import Samples, SampleSet, read_real
from cdm.judging.cells import Drawing, read_texts
from cdm.judging.design import Judging
from cdm.judging.places import Places
from cdm.system.files import digest_of, sha256, write_json
from cdm.system.records import parse_record

Number = Annotated[float, Field(allow_inf_nan=False)]
BASICS = ("evaluations", "count")
"""What the rows of an evaluation have beside figures."""


@dataclass(frozen=True)
class Result:
    """The figures of a cell: the content of results/SET/ROW.json."""

    row: str
    set: str
    asked: str
    """Hash of what was measured, and with what."""
    steps: int
    evaluations: int
    """Of the transformer for a picture."""
    count: int
    """Pictures."""
    figures: dict[str, Number]
    replicates: dict[Literal["noise", "prompts"], dict[str, list[Number]]] = field(repr=False)
    """Numbers whose deviation is the standard error of a figure: over the samples' noise or over the prompts. They
    belong to the same noise, or the same resample of the prompts, in every row of a set."""
    measured_by: dict[str, str]
    """What measured: a metric, a scorer, and its model."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self), lists_in_a_line=True)

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """The result at `path`; None where there is none. Raises CdmError if it is damaged."""
        try:
            return parse_record(cls, path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise CdmError(f"{path}: damaged: remove it and judge again") from None


def asked(judging: Judging, places: Places, row: str, name: str) -> str:
    """Hash of all that the figures of a cell depend on. Raises CdmError if something of it is missing."""
    needed = [places.samples(each, name) / MANIFEST for each in (row, judging.reference)]
    try:
        return digest_of([sha256(path) for path in (*needed, places.measuring(name))])
    except OSError as error:
        raise CdmError(
            f"{error.filename}: missing: draw the pictures first (`dvc repro`, in judging/)"
        ) from None


def measure_cell(judging: Judging, places: Places, row: str, name: str) -> Result:
    """The figures of a cell. Raises CdmError if a model or a scorer cannot be used."""
    texts, section = read_texts(places.prompts(name)), judging.evaluation(name)
    key = asked(judging, places, row, name)
    reference = _open(places, judging.reference, name, "teacher")
    own = reference if row == judging.reference else _open(places, row, name, "student")
    samples = Samples(
        student=[] if own is reference else [own],
        teacher=[own] if own is reference else [],
        full=reference,
        texts=texts,
        per_prompt=judging.prompts[name].per_prompt,
        prompts_sha256=own.store.fact("prompts_sha256", str),
        student_sha256=own.store.fact("model", str),
    )
    figures: dict[str, float] = {}
    replicates: dict[Literal["noise", "prompts"], dict[str, list[float]]] = {"noise": {}, "prompts": {}}
    real = None if section.real is None else read_real(Path(section.real), texts)
    measured = measure_chosen(
        section, samples, real, places.answers, seed=judging.seed, runtime=judging.runtime
    )
    sources: dict[str, str] = {}
    if measured is not None:
        figures |= _of(measured.figures, own)
        replicates["prompts"] |= _of(measured.replicates, own)
        sources |= dict(measured.sources)
    if section.judge is not None:
        extractor = load_extractor(section.judge)
        evaluation = evaluate(samples, real, extractor, neighbours=section.neighbours, seed=judging.seed)
        figures |= {key: value for key, value in _of(evaluation.quality, own).items() if key not in BASICS}
        replicates["noise"] |= _of(evaluation.replicates, own)
        sources["judge"] = extractor.description
    if own is reference and real is None:  # a distance to itself says nothing
        figures = {key: value for key, value in figures.items() if value or not key.endswith("_distance")}
        replicates["noise"] = {key: value for key, value in replicates["noise"].items() if key in figures}
    drawing = Drawing.read(places.drawing(row, name))
    return Result(
        row=row,
        set=name,
        asked=key,
        steps=drawing.steps,
        evaluations=drawing.evaluations,
        count=len(own.store),
        figures=figures,
        replicates=replicates,
        measured_by=sources,
    )


def _open(places: Places, row: str, name: str, role: str) -> SampleSet:
    store = Store(places.samples(row, name))
    return SampleSet(role, store.fact("steps", int), store.fact("evaluations", int), store)


def _of(tables: dict[str, dict[str, Any]], pictures: SampleSet) -> Any:
    """The entries of a sample set."""
    return tables.get(pictures.model, {}).get(pictures.key, {})
