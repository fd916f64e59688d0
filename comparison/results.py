"""The results of cells, each a small JSON file that is kept in Git, and their statistics over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Self

from cdm.errors import CdmError
from cdm.system.files import write_json
from comparison.design import Table

RESULTS = Path("comparison/results")

Row = dict[str, float]

T_975 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216)
"""The 0.975 quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Record:
    """A result as a JSON file of its fields."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """CdmError if it is not such a file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if set(values) != set(cls.__dataclass_fields__):
                raise ValueError(f"its keys are {', '.join(values)}")
        except (OSError, ValueError, TypeError) as error:
            raise CdmError(f"{path}: not a result of a cell ({error}): run the cell again") from None
        return cls(**values)


@dataclass(frozen=True)
class Result(Record):
    """The scores of one student of one method."""

    method: str
    seed: int
    settings: str
    """SHA-256 of the file of cells/ that it was made from."""
    code: str
    """Fingerprint of the training's code."""
    torch: str
    """Version."""
    student_updates: int
    forward_equivalents: float
    """Cost of the training: forwards of one sample, a forward with its backward counting 3."""
    guidance: float | None
    """See `comparison.design.guidance_strength`."""
    rows: dict[str, Row]
    """As in metrics/quality.json, by steps1, steps2, ..."""


@dataclass(frozen=True)
class TeacherResult(Record):
    """The scores of the teacher, and those that perfect samples would have."""

    settings: str
    """SHA-256 of the file of cells/ that it was made from."""
    guided: dict[str, Row]
    unguided: dict[str, Row]
    """Without guidance: one evaluation a step, as for a student."""
    floor: Row
    """Distances of as many perfect samples; empty where the teacher is the reference."""

    @property
    def full(self) -> Row:
        """The guided teacher at its full length."""
        return max(self.guided.values(), key=lambda row: row["evaluations"])


def result_path(folder: Path, table: Table, method: str, seed: int) -> Path:
    return folder / table / f"{method}-{seed}.json"


# Several seeds.


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95% interval; None of a single seed."""

    mean: float
    half: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% t-interval of up to ten independent values; ValueError for none, or more."""
    count = len(values)
    if not 1 <= count <= len(T_975) + 1:
        raise ValueError(f"{count} values: expected 1 to {len(T_975) + 1}")
    half = None if count == 1 else T_975[count - 2] * stdev(values) / math.sqrt(count)
    return Estimate(fmean(values), half, count)


@dataclass(frozen=True)
class Summary:
    """The results of one method in one table."""

    method: str
    title: str
    results: Mapping[int, Result]
    """By seed; at least one."""

    @property
    def first(self) -> Result:
        return self.results[min(self.results)]

    def evaluations(self, steps: str) -> int:
        return int(self.first.rows[steps]["evaluations"])

    def over_seeds(self, steps: str, metric: str) -> Estimate | None:
        """The mean over the seeds; None where the metric was not measured."""
        values = [_value(result, steps, metric) for result in self.results.values()]
        return _estimate_of(values)

    def against(self, other: Summary, steps: str, metric: str) -> Estimate | None:
        """The difference to another method, seed by seed: what the students of a seed share cancels."""
        return _estimate_of(self.changes(other, steps, metric))

    def changes(self, other: Summary, steps: str, metric: str, ratio: bool = False) -> list[float]:
        """How the metric of each seed that both have differs from the other method's: by difference or as a ratio."""
        changes = []
        for seed in sorted(self.results.keys() & other.results.keys()):
            ours, theirs = (_value(each.results[seed], steps, metric) for each in (self, other))
            if ours is not None and theirs is not None:
                changes.append(ours / theirs if ratio else ours - theirs)
        return changes


def _value(result: Result, steps: str, metric: str) -> float | None:
    return result.rows.get(steps, {}).get(metric)


def _estimate_of(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None
