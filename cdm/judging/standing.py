"""How the rows of a judging stand: figures with intervals, differences to the reference, published figures beside
them, and whether the measuring agrees with these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cdm.errors import CdmError
from cdm.experiments.figures import Difference, Figure, Relation
from cdm.judging.design import Judging
from cdm.judging.measuring import Result, asked
from cdm.judging.places import Places
from cdm.measures import JUDGED, Quantity, quantities

SHOWN = ("frechet_distance", "style_distance", "attribute_accuracy", "recall", "diversity")
"""Of what a judge measures, the figures that tables show; the CSV has all."""
PAIRED = Relation(comparable=True, paired=True)
"""Two rows of a set: the same prompts, and the same noise where the models' latents are of one shape."""

Outcome = Literal["agrees", "differs", "unclear"]


@dataclass(frozen=True)
class Check:
    """A measured figure beside the published one, of a model that everybody can have."""

    row: str
    set: str
    quantity: Quantity
    measured: Figure
    published: float
    tolerance: float

    @property
    def outcome(self) -> Outcome:
        """agrees: within the tolerance. differs: outside, and the whole 95 % interval too. Else nobody can tell."""
        off = abs(self.measured.value - self.published)
        if off <= self.tolerance:
            return "agrees"
        return "unclear" if off - (self.measured.reach or 0.0) <= self.tolerance else "differs"


@dataclass(frozen=True)
class Standing:
    """The results of a judging."""

    judging: Judging
    results: dict[tuple[str, str], Result]
    """By row and set; a cell that has not run is not there."""
    outdated: tuple[str, ...] = ()
    """Cells whose result is of other pictures or measures than those that are there, and which are left out."""

    @classmethod
    def read(cls, judging: Judging, places: Places) -> Standing:
        """The results that are there. Raises CdmError if there is none, or one is damaged."""
        found = {cell: Result.read(places.result(*cell)) for cell in judging.cells()}
        outdated = [
            cell for cell, result in found.items() if result and not _is_current(result, judging, places, cell)
        ]
        results = {cell: each for cell, each in found.items() if each is not None and cell not in outdated}
        if not results:
            raise CdmError(f"{places.root / 'results'}: no results yet: run `dvc repro` in judging/ first")
        return cls(judging, results, tuple("-".join(cell) for cell in outdated))

    @property
    def missing(self) -> list[str]:
        """Cells without a result."""
        cells = ((cell, "-".join(cell)) for cell in self.judging.cells())
        return [name for cell, name in cells if cell not in self.results and name not in self.outdated]

    def rows(self, name: str) -> list[str]:
        """The rows of a set that have a result."""
        return [row for row in self.judging.rows if (row, name) in self.results]

    def published_rows(self, name: str) -> list[str]:
        """Models of which there are published figures alone."""
        models = self.judging.models.items()
        return [row for row, model in models if row not in self.judging.rows and model.published.get(name)]

    def quantities(self, name: str) -> list[Quantity]:
        """What tables show of a set: chosen measures, scorers, what the judge saw, figures that are only published."""
        keys = [key for row in self.rows(name) for key in self.results[row, name].figures]
        keys += [key for model in self.judging.models.values() for key in model.published.get(name, {})]
        present = dict.fromkeys(keys)
        chosen = [key for key in present if key not in JUDGED]
        return [self.quantity(key) for key in (*chosen, *(key for key in SHOWN if key in present))]

    def quantity(self, key: str) -> Quantity:
        """How a figure is shown; one that a scorer gives is called by its key."""
        known = self._known.get(key)
        if known is not None:
            return known
        for scorer in self.judging.scorers:
            if key == scorer.name or key.startswith(f"{scorer.name}_"):
                return Quantity(key, key, scorer.better)
        return Quantity(key, key, "high")

    @cached_property
    def _known(self) -> dict[str, Quantity]:
        return {**JUDGED, **quantities()}

    def figure(self, row: str, name: str, key: str) -> Figure | None:
        """A measured figure with its error; None where it was not measured."""
        result = self.results.get((row, name))
        if result is None or key not in result.figures:
            return None
        for over in ("noise", "prompts"):
            replicates = result.replicates.get(over, {}).get(key)
            if replicates:
                return Figure(result.figures[key], tuple(replicates), over)
        return Figure(result.figures[key])

    def difference(self, row: str, name: str, key: str) -> Difference | None:
        """To the reference, paired; None for the reference itself, and where one of the two lacks the figure."""
        if row == self.judging.reference:
            return None
        ours, theirs = self.figure(row, name, key), self.figure(self.judging.reference, name, key)
        if ours is None or theirs is None:
            return None
        return PAIRED.difference(ours, theirs)

    def published(self, row: str, name: str, key: str) -> float | None:
        """What a publication says."""
        return self.judging.models[row].published.get(name, {}).get(key)

    def checks(self) -> Iterator[Check]:
        """Every figure of known models that has both a published value and a tolerance."""
        agreement = self.judging.agreement
        if agreement is None:
            return
        for row in agreement.models:
            for name in self.judging.sets:
                for key, published in self.judging.models[row].published.get(name, {}).items():
                    measured = self.figure(row, name, key)
                    if measured is not None and key in agreement.tolerance:
                        tolerance = agreement.tolerance[key]
                        yield Check(row, name, self.quantity(key), measured, published, tolerance)

    def unchecked(self) -> list[str]:
        """Published figures of known models that have a tolerance and were not measured."""
        agreement = self.judging.agreement
        if agreement is None:
            return []
        return [
            f"{self.quantity(key).title} of {self.judging.models[row].title}"
            for row in agreement.models
            for name in self.judging.sets
            for key in self.judging.models[row].published.get(name, {})
            if key in agreement.tolerance and self.figure(row, name, key) is None
        ]

    def verdict(self) -> str | None:
        """Whether the other rows can be believed, in a sentence or two; None where there is nothing to go by."""
        if self.judging.agreement is None:
            return None
        checks, lacking = list(self.checks()), self.unchecked()
        if not checks:
            return "No known model has been measured yet: figures cannot be compared with published ones."
        off = {
            outcome: [each for each in checks if each.outcome == outcome] for outcome in ("differs", "unclear")
        }
        if off["differs"]:
            text = (
                f"The measuring does not agree with the published figures: {_listed(off['differs'], self.judging)}."
                " Do not compare other rows with published ones before it does."
            )
        elif off["unclear"]:
            text = (
                f"Too few pictures to tell whether the measuring agrees: {_listed(off['unclear'], self.judging)} is off"
                " by more than the tolerance, but not by more than chance may do."
            )
        else:
            text = (
                f"The measuring agrees with the published figures: all {len(checks)} of the known models are within the"
                " tolerance."
            )
        return text + (f" Not measured: {', '.join(lacking)}." if lacking else "")


def _listed(checks: list[Check], judging: Judging) -> str:
    return ", ".join(f"{each.quantity.title} of {judging.models[each.row].title}" for each in checks)


def _is_current(result: Result, judging: Judging, places: Places, cell: tuple[str, str]) -> bool:
    """Whether a result is of the pictures and measures that are there; where the pictures are not, it is taken as it
    is: Git has results, and not what they are of."""
    try:
        return result.asked == asked(judging, places, *cell)
    except CdmError:
        return True
