"""Stage `table`: the tables and figures of whatever cells have results; run it by hand at any time."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cdm.errors import CdmError
from cdm.measures import JUDGED, Quantity
from cdm.params import load
from comparison.collect import METRICS, Collected, collect
from comparison.design import Table, load_comparison
from comparison.results import RESULTS, Estimate, Row, Summary, TeacherResult
from stages.common import PARAMS, run

HEADINGS = {
    "updates": "Equal numbers of student updates",
    "cost": "Equal cost",
    "ablations": "Ablations",
}
GLANCE = [
    *((JUDGED["frechet_distance"], steps) for steps in (1, 2, 3, 4, 6, 8)),
    *((JUDGED["style_distance"], steps) for steps in (4, 8)),
    *((JUDGED[key], 4) for key in ("attribute_accuracy", "recall", "diversity")),
]
"""Columns of the short table: a metric and a number of steps."""


# CSV.


def csv_rows(found: Collected) -> Iterator[dict[str, Any]]:
    """A row a table, method and number of steps: means over seeds, and half the widths of their intervals."""
    for table, summary in found.summaries:
        for steps, row in summary.first.rows.items():
            record: dict[str, Any] = {
                "table": table,
                "method": summary.method,
                "seeds": len(summary.results),
                "student_updates": summary.first.student_updates,
                "forward_equivalents": round(summary.first.forward_equivalents),
                "guidance": summary.first.guidance,
                "steps": steps.removeprefix("steps"),
                "evaluations": row["evaluations"],
            }
            for metric in METRICS:
                over_seeds = summary.over_seeds(steps, metric.key)
                record[metric.key] = over_seeds and _rounded(over_seeds.mean)
                record[f"{metric.key}_interval"] = over_seeds and _rounded(over_seeds.half)
            yield record
    if found.teacher is not None:
        for name, rows in _teachers(found.teacher).items():
            for steps, row in rows.items():
                figures = {metric.key: row.get(metric.key) for metric in METRICS}
                cost = {"steps": steps.removeprefix("steps"), "evaluations": row["evaluations"]}
                yield {"table": "teacher", "method": name, **cost, **figures}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _teachers(teacher: TeacherResult) -> dict[str, dict[str, Row]]:
    return {"teacher, guided": teacher.guided, "teacher, no guidance": teacher.unguided}


def write_csv(found: Collected, path: Path) -> None:
    rows = list(csv_rows(found))
    with path.open("w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# Markdown.


def markdown(found: Collected) -> str:
    """The tables as a Markdown page."""
    title = found.comparison.methods[found.comparison.reference].title
    lines = [
        "# Methods compared",
        "",
        "Made by `python -m comparison.table`; [README.md](README.md) says how to read it.",
        "Figures are means over seeds ± half of their 95% t-interval (none of a single seed).",
        f"▲ is better than {title} and ▼ is worse, where the 95% interval of the difference, seed by seed, excludes 0.",
        "",
    ]
    for table, summaries in found.tables.items():
        if summaries:
            lines += [f"## {HEADINGS[table]}", "", *glance(found, table), "", *_costs(summaries), ""]
            for metric in METRICS:
                lines += _metric_table(found, table, metric)
    if found.teacher is not None:
        lines += ["## Teacher", "", *_teacher_table(found.teacher)]
    return "\n".join(lines).rstrip() + "\n"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def glance(found: Collected, table: Table) -> list[str]:
    """What fits on a page: means alone, of the columns `GLANCE`, and the cost as a multiple of the reference's."""
    reference = found.reference(table)
    columns = [(metric, steps) for metric, steps in GLANCE if steps in found.comparison.steps]
    rows = []
    for summary in found.tables[table]:
        cells = [summary.over_seeds(f"steps{steps}", metric.key) for metric, steps in columns]
        means = [
            _number(cell.mean if cell else None, metric)
            for cell, (metric, _) in zip(cells, columns, strict=True)
        ]
        cost = summary.first.forward_equivalents / reference.first.forward_equivalents if reference else None
        seeds = len(summary.results)
        rows.append([summary.title, str(seeds), "" if cost is None else f"{cost:.2f}", *means])
    if found.teacher is not None:
        full = found.teacher.full
        means = [_number(full.get(metric.key), metric) for metric, _ in columns]
        rows.append([f"teacher, guided, {full['evaluations']:.0f} evaluations", "", "", *means])
    heads = [
        f"{metric.title.split()[0] if metric.better == 'low' else metric.title} at {n}" for metric, n in columns
    ]
    return _grid(["method", "seeds", "cost", *heads], rows)


def _costs(summaries: Sequence[Summary]) -> list[str]:
    header = ["method", "seeds", "student updates", "million forward-equivalents", "guidance strength"]
    rows = [
        [
            summary.title,
            str(len(summary.results)),
            f"{summary.first.student_updates:,}",
            f"{summary.first.forward_equivalents / 1e6:.2f}",
            "" if summary.first.guidance is None else f"{summary.first.guidance:.2f}",
        ]
        for summary in summaries
    ]
    return _grid(header, rows)


def _metric_table(found: Collected, table: Table, metric: Quantity) -> list[str]:
    """One figure of all methods against evaluations; nothing where it was not measured."""
    steps = [f"steps{number}" for number in sorted(found.comparison.steps)]
    reference = found.reference(table)
    rows = []
    for summary in found.tables[table]:
        cells = [_cell(summary, reference, key, metric) for key in steps]
        if any(cells):
            rows.append([summary.title, *cells])
    if not rows:
        return []
    if found.teacher is not None:
        for name, of_teacher in _teachers(found.teacher).items():
            by_cost = {int(row["evaluations"]): row for row in of_teacher.values()}
            cells = [
                _number(by_cost.get(number, {}).get(metric.key), metric) for number in found.comparison.steps
            ]
            rows.append([name, *cells])
    goal = {"high": "more is better", "low": "less is better", None: "like the teacher's"}[metric.better]
    header = [f"{metric.title} ({goal}) at", *(f"{number}" for number in sorted(found.comparison.steps))]
    return [*_grid([*header[:-1], f"{header[-1]} evaluations"], rows), ""]


def _cell(summary: Summary, reference: Summary | None, steps: str, metric: Quantity) -> str:
    over_seeds = summary.over_seeds(steps, metric.key)
    if over_seeds is None:
        return ""
    text = _number(over_seeds.mean, metric)
    if over_seeds.half is not None:
        text += f" ± {_number(over_seeds.half, metric)}"
    if reference is None or reference.method == summary.method:
        return text
    return text + verdict(summary.against(reference, steps, metric.key), metric)


def verdict(difference: Estimate | None, metric: Quantity) -> str:
    """An arrow where a difference to the reference is clear, after a space."""
    if difference is None or not difference.excludes_zero or metric.better is None:
        return ""
    return " ▲" if (difference.mean > 0) == (metric.better == "high") else " ▼"


def _number(value: float | None, metric: Quantity) -> str:
    return "" if value is None else f"{value:.{metric.decimals}f}"


def _teacher_table(teacher: TeacherResult) -> list[str]:
    header = ["", "steps", "evaluations", *(metric.title for metric in METRICS)]
    rows = [
        [
            name,
            steps.removeprefix("steps"),
            f"{row['evaluations']:.0f}",
            *(_number(row.get(metric.key), metric) for metric in METRICS),
        ]
        for name, of_teacher in _teachers(teacher).items()
        for steps, row in of_teacher.items()
    ]
    if teacher.floor:
        rows.append(["perfect samples", "", "", *(_number(teacher.floor.get(m.key), m) for m in METRICS)])
    return _grid(header, rows)


# The stage.


def main(
    csv_file: Annotated[Path, typer.Option("--csv", help="CSV file to write.")] = Path("comparison/table.csv"),
    page: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("comparison/table.md"),
    figures: Annotated[Path, typer.Option(help="Folder of figures to write.")] = Path("comparison/figures"),
) -> None:
    """Write the tables and figures of the results that are there, and say which are not."""
    from comparison.figure import draw, draw_changes

    found = collect(load_comparison())
    if not found.summaries:
        raise CdmError(f"{RESULTS}: no results of the present cells yet: make comparison")
    write_csv(found, csv_file)
    page.write_text(markdown(found), encoding="utf-8")
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for table, summaries in found.tables.items():
        if summaries:
            variants = table == "ablations" and found.reference(table) and len(summaries) > 1
            (figures / f"{table}.png").write_bytes((draw_changes if variants else draw)(found, table))
    print("\n".join([*state(found), f"{page}: the tables"]))


def state(found: Collected) -> list[str]:
    """What the tables lack, and what in them was made by other code than today's."""
    from comparison.run import training_code

    code = training_code(load(PARAMS).teacher.family)
    older = {
        f"{summary.method}-{seed}"
        for _, summary in found.summaries
        for seed, result in summary.results.items()
        if result.code != code
    }
    remarks = {
        "without a result": found.missing,
        "with a result of other parameters, left out": found.outdated,
        "made by other code than today's": sorted(older),
    }
    return [f"{len(names)} {what}: {_some(names)}" for what, names in remarks.items() if names]


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return " ".join(names[:most]) + more


if __name__ == "__main__":
    run(main)
