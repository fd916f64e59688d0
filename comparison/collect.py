"""Collection of the results of the present cells, by table, and of the cells without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cdm.measures import JUDGED
from cdm.system.files import sha256
from comparison.design import CELLS, TABLES, Comparison, Table
from comparison.results import RESULTS, Result, Summary, TeacherResult, result_path

METRICS = [
    JUDGED[key]
    for key in (
        "frechet_distance",
        "style_distance",
        "attribute_accuracy",
        "precision",
        "recall",
        "diversity",
    )
]
"""What is compared, in the order of the tables."""


@dataclass
class Collected:
    """All results that belong to the present cells."""

    comparison: Comparison
    teacher: TeacherResult | None = None
    tables: dict[Table, list[Summary]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Cells without a result."""
    outdated: list[str] = field(default_factory=list)
    """Cells whose result is of other parameters, and which are left out."""

    @property
    def summaries(self) -> list[tuple[Table, Summary]]:
        return [(table, summary) for table, rows in self.tables.items() for summary in rows]

    def reference(self, table: Table) -> Summary | None:
        name = self.comparison.reference
        return next((each for each in self.tables[table] if each.method == name), None)


def collect(comparison: Comparison, cells: Path = CELLS, results: Path = RESULTS) -> Collected:
    """The results in `results` that were made from the parameters in `cells`. Raises CdmError if one is damaged."""
    found = Collected(comparison)
    path = results / "teacher.json"
    if path.exists():
        teacher = TeacherResult.read(path)
        if _is_current(teacher.settings, cells / "teacher.yaml"):
            found.teacher = teacher
    for table in TABLES:
        found.tables[table] = []
        for source, name in comparison.rows(table):
            by_seed: dict[int, Result] = {}
            for seed in comparison.seeds:
                path, label = result_path(results, source, name, seed), f"{source}@{name}-{seed}"
                result = Result.read(path) if path.exists() else None
                if result is None:
                    found.missing += [label] * (source == table)
                elif not _is_current(result.settings, cells / source / f"{name}.yaml"):
                    found.outdated += [label] * (source == table)
                else:
                    by_seed[seed] = result
            if by_seed:
                found.tables[table].append(Summary(name, comparison.methods[name].title, by_seed))
    return found


def _is_current(settings: str, path: Path) -> bool:
    return path.is_file() and sha256(path) == settings
