"""The figures of an experiment with their errors, and which differences of two experiments the errors bear out.

A figure's error is the deviation of its replicates (metrics/quality.json keeps them): of those over the samples' noise
for what every evaluation measures, of those over the prompts for what `evaluate.metrics` and `evaluate.scorers` choose.
Where two experiments drew from the same noise for the same prompts, their replicates belong together one by one, and
the error of a difference is the deviation of the differences. It is smaller than that of two separate sets, because
what both have in common is no error of the difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Literal

from cdm.errors import CdmError
from cdm.experiments.headline import steps_of
from cdm.experiments.revisions import Revision
from cdm.measures import JUDGED, Quantity, by_judge, headlines, is_quality, quantities, student_t

QUALITY = "metrics/quality.json"
HEADLINE = "metrics/headline.json"
Over = Literal["noise", "prompts"]
Mark = Literal["better", "worse", "other", ""]
"""`other`: the figures differ, and neither more nor less of it is good."""


@dataclass(frozen=True)
class Figure:
    """A figure of one sample set."""

    value: float
    replicates: tuple[float, ...] = ()
    """Only their spread means something; empty where no error is known."""
    over: Over = "noise"

    @property
    def reach(self) -> float | None:
        """Half of the 95 % interval; None where no error is known."""
        return _reach(self.replicates, self.over)


@dataclass(frozen=True)
class Difference:
    """How much a figure is above that of the baseline."""

    value: float
    reach: float | None
    """Half of its 95 % interval; None where no error is known, or the two figures are not of the same task."""

    def mark(self, quantity: Quantity) -> Mark:
        """What the interval bears out: whether it leaves out 0, and then which of the two is better."""
        if self.reach is None or abs(self.value) <= self.reach:
            return ""
        if quantity.better is None:
            return "other"
        return "better" if (self.value < 0) == (quantity.better == "low") else "worse"


@dataclass(frozen=True)
class Results:
    """What one revision's evaluation has found: the content of metrics/quality.json, and its headline."""

    revision: Revision
    quality: Mapping[str, Any]
    headline: Mapping[str, float]

    @property
    def basis(self) -> Mapping[str, Any] | None:
        """What the figures are of; None for results of before this was kept."""
        return self.quality.get("basis")

    def steps(self, model: str) -> list[int]:
        """Numbers of steps that there are samples of, from the fewest to the most."""
        return sorted(steps_of(key) for key in self.quality.get(model, {}))

    @property
    def full(self) -> int:
        """The teacher's full number of steps."""
        return max(self.steps("teacher"))

    def row(self, model: str, steps: int) -> Mapping[str, float]:
        """All figures of a sample set; none where there is no such set."""
        found: Mapping[str, float] = self.quality.get(model, {}).get(f"steps{steps}", {})
        return found

    def figure(self, model: str, steps: int, name: str) -> Figure | None:
        """A figure with its replicates; None where it was not measured."""
        row = self.row(model, steps)
        if name not in row:
            return None
        for over in ("noise", "prompts"):
            sets = self.quality.get("replicates", {}).get(over, {})
            replicates = sets.get(model, {}).get(f"steps{steps}", {}).get(name)
            if replicates:
                return Figure(row[name], tuple(replicates), over)
        return Figure(row[name])


def read(revision: Revision) -> Results | None:
    """The results of a revision; None where it has none. Raises CdmError if they are damaged."""
    text = revision.read(QUALITY)
    if text is None:
        return None
    try:
        quality, headline = json.loads(text), json.loads(revision.read(HEADLINE) or "{}")
    except (ValueError, RecursionError):
        quality = headline = None
    numbers = isinstance(headline, dict) and all(isinstance(each, int | float) for each in headline.values())
    if not is_quality(quality) or not numbers:
        raise CdmError(f"{revision.name}: its {QUALITY} is damaged: run `dvc repro` there")
    return Results(revision, quality, headline)


def known_quantities(results: Sequence[Results]) -> list[Quantity]:
    """What the students were measured by: the main figures first, then those that were chosen."""
    present = dict.fromkeys(
        name for each in results for steps in each.steps("student") for name in each.row("student", steps)
    )
    chosen, known = [name for name in present if name not in JUDGED and name != "count"], quantities()
    judged = all(by_judge(each.quality) for each in results)
    return [
        *(quantity for quantity in headlines(judged) if quantity.key in present),
        *(known.get(name, Quantity(name, name)) for name in chosen),
    ]


@dataclass(frozen=True)
class Relation:
    """How far the figures of an experiment may be compared with those of the baseline."""

    comparable: bool
    """Whether they are of the same task: prompts, number of samples, judge, reference."""
    paired: bool
    """Whether they are of the same noise too."""
    remarks: tuple[str, ...] = ()
    """What is not the same, for a reader."""

    def difference(self, figure: Figure, baseline: Figure) -> Difference:
        """Of two figures of a kind, with an error if they are comparable."""
        value = figure.value - baseline.value
        ours, theirs = figure.replicates, baseline.replicates
        if not self.comparable or not ours or not theirs or figure.over != baseline.over:
            return Difference(value, None)
        if self.paired and len(ours) == len(theirs):
            differences = tuple(one - other for one, other in zip(ours, theirs, strict=True))
            return Difference(value, _reach(differences, figure.over))
        both = (figure.reach, baseline.reach)
        return Difference(value, None if None in both else math.hypot(*(reach or 0.0 for reach in both)))


def relate(results: Results, baseline: Results) -> Relation:
    """What the two evaluations have in common."""
    ours, theirs = results.basis, baseline.basis
    if ours is None or theirs is None:
        older = baseline if theirs is None else results
        return Relation(
            False, False, (f"{older.revision.name} was measured before errors were kept: run it again",)
        )

    def differs(*keys: str) -> bool:
        return any(ours[key] != theirs[key] for key in keys)

    reference = "the reference is the teacher's samples, and the teachers differ"
    problems = {
        "other evaluation prompts": differs("prompts"),
        "another number of samples": differs("per_prompt"),
        "another judge": differs("judge"),
        "other real pictures": differs("real"),
        reference: ours["real"] is None
        and (differs("teacher", "guidance_scale") or results.full != baseline.full),
        "other models of measures": differs("models"),
    }
    found = tuple(problem for problem, there in problems.items() if there)
    if found:
        return Relation(False, False, tuple(f"{each}: the figures are not of the same task" for each in found))
    remarks = []
    if differs("seed"):
        remarks.append(
            f"seed {ours['seed']} and not {theirs['seed']}: not the same noise, and another training all over"
        )
    if differs("teacher"):
        remarks.append("another teacher")
    return Relation(True, not remarks, tuple(remarks))


def _reach(replicates: Sequence[float], over: Over) -> float | None:
    """Half of the 95 % interval of what has these replicates."""
    if len(replicates) < 2:
        return None
    factor = student_t(len(replicates) - 1) if over == "noise" else student_t(math.inf)
    return factor * stdev(replicates)
