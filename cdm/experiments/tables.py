"""Comparisons as text for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from cdm.experiments.changes import brief, parameters
from cdm.experiments.comparison import Compared, Entry
from cdm.experiments.figures import Figure, Mark
from cdm.experiments.headline import kinds
from cdm.measures import Quantity, steps_in_words

WIDTH = 120
NAME = 24
"""Most columns of an experiment's name."""
CHANCE = (
    "About one mark in twenty is chance. Intervals are over the samples: they tell two students apart, not two"
    " settings, because training again with another seed makes another student too."
)
SIGNS: dict[Mark, str] = {"better": "+", "worse": "-", "other": "*", "": " "}


def full_table(compared: Compared) -> str:
    """What was changed, every figure with its interval and mark, what the trainings took, and what the marks mean."""
    parts = [
        _heading(compared),
        _changes(compared),
        *(_figures(compared, quantity) for quantity in compared.quantities),
        _training(compared),
        "\n".join(_remarks(compared)),
    ]
    return "\n\n".join(part for part in parts if part)


def brief_table(compared: Compared) -> str:
    """A row an experiment: its name, what was changed, and the main figures of the student, as many as there is room
    for."""
    names = kinds(compared.baseline.results.quality)
    columns = [(f"{title}@{steps}", name, steps) for name, title in names.items() for steps in compared.steps]
    rows = []
    for entry in compared.entries:
        cells = [_short(entry.results.row("student", steps).get(name)) for _, name, steps in columns]
        rows.append([*cells, _short(entry.results.headline.get("train seconds"))])
    titles = [*(title for title, _, _ in columns), "seconds"]
    widths = [max(len(title), *(len(row[i]) for row in rows)) + 2 for i, title in enumerate(titles)]
    label = max(len("experiment"), *(len(_cut(entry.name)) for entry in compared.entries)) + 2
    while label + 20 + sum(widths) > WIDTH and len(widths) > 1:
        widths.pop()
    room = WIDTH - label - sum(widths)
    texts = [_changed_in_brief(compared, entry, room - 2) for entry in compared.entries]
    room = max(len(line) for lines in [["changed"], *texts] for line in lines) + 2
    lines = [_row("experiment", label, "changed", room, titles, widths)]
    for entry, text, cells in zip(compared.entries, texts, rows, strict=True):
        lines.append(_row(_cut(entry.name), label, text[0], room, cells, widths))
        lines += [" " * label + line for line in text[1:]]
    return "\n".join([*lines, *compared.skipped])


def _row(name: str, label: int, text: str, room: int, cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"{name:<{label}}{text:<{room}}{numbers}".rstrip()


def _changed_in_brief(compared: Compared, entry: Entry, width: int) -> list[str]:
    """The lines of what was changed; keys are as short as they can be without a mistake."""
    if entry is compared.baseline:
        return ["(baseline)"]
    keys = parameters(compared.baseline.results.revision)
    texts = [
        f"{brief(change.key, keys)}={change.after}" if change.after else change.key.rsplit("/", 1)[-1]
        for change in entry.changed
    ]
    return textwrap.wrap(", ".join(texts) or "nothing", width) or [""]


def _heading(compared: Compared) -> str:
    others = ", ".join(each.name for each in compared.others) or "nothing else"
    text = f"{compared.baseline.results.revision.title}, and compared with it: {others}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def _changes(compared: Compared) -> str:
    width = max((len(change.key) for each in compared.others for change in each.changed), default=0)
    lines = []
    for entry in compared.others:
        texts = [
            f"{change.key:<{width}}  {change.before} → {change.after}"
            if change.after
            else f"{change.key} (code)"
            for change in entry.changed
        ]
        for number, text in enumerate(texts or ["nothing: the same parameters and code"]):
            lines.append(f"  {'' if number else _cut(entry.name):<{NAME}}  {text}")
    return "\n".join(["Changed", *lines]) if lines else ""


def _figures(compared: Compared, quantity: Quantity) -> str:
    """A block of one figure: a row an experiment, a column a number of steps."""
    rows = [(_cut(entry.name), _cells(compared, entry, quantity)) for entry in compared.entries]
    titles = [steps_in_words(steps) for steps in compared.steps]
    width = max(16, *(len(cell) for _, cells in rows for cell in cells)) + 2
    head = f"{quantity.title} {quantity.arrow}".rstrip()
    lines = [f"{head:<{NAME + 2}}" + "".join(f"{title + '  ':>{width}}" for title in titles)]
    lines += [f"  {name:<{NAME}}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
    teacher = compared.teacher(quantity.key)
    if teacher is not None:
        lines.append(f"  teacher at {compared.baseline.results.full} steps: {_cell(teacher, quantity)}")
    return "\n".join(line.rstrip() for line in lines)


def _cells(compared: Compared, entry: Entry, quantity: Quantity) -> list[str]:
    cells = []
    for steps in compared.steps:
        figure = entry.results.figure("student", steps, quantity.key)
        difference = compared.difference(entry, steps, quantity.key)
        mark = difference.mark(quantity) if difference is not None else ""
        cells.append(f"{_cell(figure, quantity)} {SIGNS[mark]}" if figure is not None else "- ")
    return cells


def _cell(figure: Figure, quantity: Quantity) -> str:
    value = number(figure.value, quantity)
    return value if figure.reach is None else f"{value} ± {number(figure.reach, quantity, like=figure.value)}"


def number(value: float, quantity: Quantity, like: float | None = None) -> str:
    """A figure as text: shares in per cent, others to about three digits; an interval with the digits of `like`."""
    if quantity.percent:
        return f"{100 * value:.1f} %" if like is None else f"{100 * value:.1f}"
    size = abs(value if like is None else like)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def _training(compared: Compared) -> str:
    took = [entry.results.headline for entry in compared.entries]
    if not any(took):
        return ""
    lines = [f"{'Training':<{NAME + 2}}{'seconds':>16}{'forward-equivalents':>24}"]
    for entry, each in zip(compared.entries, took, strict=True):
        seconds, forwards = _thousands(each.get("train seconds")), _thousands(each.get("train forwards"))
        lines.append(f"  {_cut(entry.name):<{NAME}}{seconds:>16}{forwards:>24}")
    return "\n".join(lines)


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _remarks(compared: Compared) -> list[str]:
    """What the marks mean, and what is not the same in every experiment."""
    lines = [f"{name}: {remark}" for name, remark in remarks(compared)] + compared.skipped
    if any(each.relation.comparable for each in compared.others):
        name = compared.baseline.name
        lines = [
            f"± is half the 95 % interval of a figure. + is better than {name} and - is worse: the 95 % interval of the"
            " difference leaves out 0 (of samples paired by prompt and noise, where these are the same).",
            CHANCE,
            *lines,
        ]
    return [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def remarks(compared: Compared) -> list[tuple[str, str]]:
    """What is not the same as in the baseline, by experiment."""
    return [(each.name, remark) for each in compared.others for remark in each.relation.remarks]


def _cut(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
