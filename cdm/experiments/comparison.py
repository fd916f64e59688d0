"""A comparison of experiments with a baseline: their results, what was changed in each, how far figures compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cdm.errors import CdmError
from cdm.experiments.changes import Change, changes
from cdm.experiments.figures import (
    QUALITY,
    Difference,
    Figure,
    Relation,
    Results,
    known_quantities,
    read,
    relate,
)
from cdm.experiments.revisions import WORKSPACE, find
from cdm.measures import Quantity


@dataclass(frozen=True)
class Entry:
    """An experiment beside the baseline; the first entry of a comparison is the baseline itself."""

    results: Results
    changed: list[Change]
    relation: Relation

    @property
    def name(self) -> str:
        return self.results.revision.name


@dataclass(frozen=True)
class Compared:
    """Experiments and their baseline."""

    entries: list[Entry]
    skipped: list[str]
    """What was found and is not compared, each with a reason."""

    @property
    def baseline(self) -> Entry:
        return self.entries[0]

    @property
    def others(self) -> list[Entry]:
        return self.entries[1:]

    @cached_property
    def quantities(self) -> list[Quantity]:
        return known_quantities([each.results for each in self.entries])

    @cached_property
    def steps(self) -> list[int]:
        """Numbers of steps of any of the students."""
        return sorted({steps for each in self.entries for steps in each.results.steps("student")})

    def difference(self, entry: Entry, steps: int, name: str) -> Difference | None:
        """To the baseline, of a figure of the student; None where one of the two lacks it."""
        figure, other = (each.results.figure("student", steps, name) for each in (entry, self.baseline))
        if entry is self.baseline or figure is None or other is None:
            return None
        return entry.relation.difference(figure, other)

    def teacher(self, name: str) -> Figure | None:
        """The baseline's teacher at its full number of steps, where its figure means something."""
        results = self.baseline.results
        figure = results.figure("teacher", results.full, name)
        return figure if figure is not None and figure.value else None


def compare(names: Sequence[str], folder: Path = Path()) -> Compared:
    """The comparison of the revisions that `names` ask for (`cdm.experiments.revisions.find`).

    Raises CdmError for a name that is unknown or has no results. Where none was asked for, experiments without results
    are left out, and so is a working tree that equals an experiment.
    """
    skipped: list[str] = []
    found: list[Results] = []
    for revision in find(names, folder):
        results = read(revision)
        if results is None and (names or not found):
            raise CdmError(f"{revision.name}: has no {QUALITY}: let `dvc repro` run to its end there")
        if results is None:
            skipped.append(f"{revision.name}: no results yet")
            continue
        twin = next((each for each in found if _same(each, results)), None)
        if not names and revision.name == WORKSPACE and twin is not None:
            skipped.append(f"{WORKSPACE}: the same as {twin.revision.name}")
            continue
        found.append(results)
    baseline = found[0]
    entries = [Entry(each, changes(each.revision, baseline.revision), relate(each, baseline)) for each in found]
    return Compared(entries, skipped)


def _same(one: Results, other: Results) -> bool:
    """Whether two revisions have the same figures and parameters."""
    return one.quality == other.quality and not changes(one.revision, other.revision)
