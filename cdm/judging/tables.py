"""The table of a judging: for a terminal of 120 columns, as Markdown, and as CSV for DVC's plots."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from cdm.experiments.figures import Difference, Figure
from cdm.experiments.tables import SIGNS, number
from cdm.judging.standing import Standing
from cdm.measures import Quantity

WIDTH = 120
NAME = 30
"""Most columns of a model's name."""
OUTCOMES = {"agrees": "agrees", "differs": "DIFFERS", "unclear": "cannot tell"}


def text_table(standing: Standing) -> str:
    """All sets, one below the other, with what the marks mean."""
    parts = [_set(standing, name) for name in standing.judging.sets if standing.rows(name)]
    parts += [_agreement(standing), "\n".join(_wrapped(remarks(standing)))]
    return "\n\n".join(part for part in parts if part)


def remarks(standing: Standing) -> list[str]:
    """What the marks mean, and what is missing."""
    reference = standing.judging.models[standing.judging.reference].title
    lines = [
        f"± is half the 95 % interval of a figure, over the prompts; of what a judge sees, over the noise. + is better"
        f" than {reference} and - is worse, * differs: the 95 % interval of the difference leaves out 0, of pictures"
        " paired by prompt and noise. About one mark in twenty is chance."
    ]
    return lines + gaps(standing)


def gaps(standing: Standing) -> list[str]:
    """What is missing, a line each."""
    found = {
        "without a result": standing.missing,
        "with a result of other pictures or measures, left out": standing.outdated,
    }
    return [f"Cells {what}: {', '.join(names[:8])}" for what, names in found.items() if names]


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def heading(standing: Standing, name: str) -> str:
    """What a set is: its title, prompts and pictures."""
    chosen = standing.judging.prompts[name]
    count = standing.results[standing.rows(name)[0], name].count
    each = f"{chosen.per_prompt} picture{'s' if chosen.per_prompt > 1 else ''} a prompt"
    return f"{chosen.title}: {count // chosen.per_prompt:,} prompts, {each}"


def value(figure: Figure, quantity: Quantity) -> str:
    """A figure and half of its interval."""
    text = number(figure.value, quantity)
    return text if figure.reach is None else f"{text} ± {number(figure.reach, quantity, like=figure.value)}"


def change(difference: Difference, quantity: Quantity, like: float) -> str:
    """A difference with its sign, and half of its interval."""
    amount = number(difference.value, quantity, like=like)
    reach = "" if difference.reach is None else f" ± {number(difference.reach, quantity, like=like)}"
    return f"{'+' if difference.value > 0 else ''}{amount}{reach}".replace("-", "\u2212")


def cell(standing: Standing, row: str, name: str, quantity: Quantity) -> str:
    """A figure with its interval and mark; empty where it was not measured."""
    figure = standing.figure(row, name, quantity.key)
    if figure is None:
        return ""
    difference = standing.difference(row, name, quantity.key)
    mark = SIGNS[difference.mark(quantity)] if difference is not None else " "
    return f"{value(figure, quantity)} {mark}"


def _change(standing: Standing, row: str, name: str, quantity: Quantity) -> str:
    difference = standing.difference(row, name, quantity.key)
    figure = standing.figure(row, name, quantity.key)
    return "" if difference is None or figure is None else change(difference, quantity, figure.value) + "  "


def _published(standing: Standing, row: str, name: str, quantity: Quantity) -> str:
    found = standing.published(row, name, quantity.key)
    return "" if found is None else number(found, quantity) + "  "


def _set(standing: Standing, name: str) -> str:
    """A set: blocks of as many figures as fit beside each other; rows, published figures, differences."""
    quantities = standing.quantities(name)
    lines = [heading(standing, name)]
    grid = list(_grid(standing, name, quantities))
    widths = [max(len(cells[i]) for _, _, cells in grid) + 2 for i in range(len(quantities))]
    titles = [f"{quantity.title} {quantity.arrow}".rstrip() + "  " for quantity in quantities]
    widths = [max(width, len(title) + 1) for width, title in zip(widths, titles, strict=True)]
    for block in _blocks(widths):
        lines.append(
            f"{'':<{NAME + 2}}{'evaluations':>11}" + "".join(f"{titles[i]:>{widths[i]}}" for i in block)
        )
        for label, evaluations, cells in grid:
            shown = [cells[i] for i in block]
            if any(shown) or evaluations:
                text = "".join(f"{each:>{widths[i]}}" for each, i in zip(shown, block, strict=True))
                lines.append(f"  {label if evaluations == ' ' else cut(label):<{NAME}}{evaluations:>11}{text}")
        lines.append("")
    return "\n".join(line.rstrip() for line in lines[:-1])


def _grid(
    standing: Standing, name: str, quantities: Sequence[Quantity]
) -> Iterator[tuple[str, str, list[str]]]:
    """Label, evaluations and cells of each line of a set."""
    reference = standing.judging.models[standing.judging.reference].title
    for row in standing.rows(name):
        evaluations = str(standing.results[row, name].evaluations)
        title = standing.judging.models[row].title
        yield title, evaluations, [cell(standing, row, name, each) for each in quantities]
        if standing.judging.models[row].published.get(name):
            yield "  published", "", [_published(standing, row, name, each) for each in quantities]
    for row in standing.published_rows(name):
        title = standing.judging.models[row].title
        yield title, "published", [_published(standing, row, name, each) for each in quantities]
    others = [row for row in standing.rows(name) if row != standing.judging.reference]
    if others and standing.judging.reference in standing.rows(name):
        yield f"difference to {reference}", " ", [""] * len(quantities)
        for row in others:
            title = standing.judging.models[row].title
            yield f"  {title}", "", [_change(standing, row, name, each) for each in quantities]


def _blocks(widths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of columns that fit beside each other."""
    block: list[int] = []
    for number_, width in enumerate(widths):
        if block and NAME + 13 + sum(widths[i] for i in block) + width > WIDTH:
            yield block
            block = []
        block.append(number_)
    yield block


def cut(text: str) -> str:
    """A name that fits into its column."""
    return text if len(text) <= NAME else f"{text[: NAME - 1]}…"


def _agreement(standing: Standing) -> str:
    """Known models beside their publication, and the verdict."""
    verdict = standing.verdict()
    if verdict is None:
        return ""
    head = "Agreement with published figures"
    lines = [f"{head:<{NAME + 26}}{'measured':>18}{'published':>12}{'tolerance':>12}"]
    for each in standing.checks():
        title, figure = standing.judging.models[each.row].title, each.quantity.title[:22]
        published = number(each.published, each.quantity)
        lines.append(
            f"  {cut(title):<{NAME}}{figure:<24}{value(each.measured, each.quantity):>18}{published:>12}"
            f"{each.tolerance:>12g}  {OUTCOMES[each.outcome]}"
        )
    return "\n".join([*lines, *_wrapped([verdict])])


# Markdown.


def markdown(standing: Standing, made_by: str) -> str:
    """The tables as a page of Markdown."""
    lines = ["# Models judged", "", made_by, ""]
    for name in standing.judging.sets:
        if standing.rows(name):
            lines += [f"## {heading(standing, name)}", "", *_markdown_set(standing, name), ""]
    verdict = standing.verdict()
    if verdict is not None:
        lines += ["## Agreement with published figures", "", verdict, "", *_markdown_agreement(standing), ""]
    return "\n".join([*lines, *(f"{line}\n" for line in remarks(standing))]).rstrip() + "\n"


def _markdown_set(standing: Standing, name: str) -> list[str]:
    quantities = standing.quantities(name)
    header = ["", "evaluations", *(f"{each.title} {each.arrow}".rstrip() for each in quantities)]
    rows = []
    for label, evaluations, cells in _grid(standing, name, quantities):
        first = f"*{label}*" if evaluations == " " else label.strip()
        rows.append([first, evaluations.strip(), *(each.strip() for each in cells)])
    return markdown_grid(header, rows)


def _markdown_agreement(standing: Standing) -> list[str]:
    rows = [
        [
            standing.judging.models[each.row].title,
            each.quantity.title,
            value(each.measured, each.quantity),
            number(each.published, each.quantity),
            f"{each.tolerance:g}",
            OUTCOMES[each.outcome],
        ]
        for each in standing.checks()
    ]
    return markdown_grid(["", "figure", "measured", "published", "tolerance", ""], rows) if rows else []


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


# CSV.


def as_csv(standing: Standing) -> str:
    """A row a cell and figure, with the ends of intervals: of the figure, and of its difference to the reference."""
    text = io.StringIO()
    rows = list(_records(standing))
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _records(standing: Standing) -> Iterator[dict[str, Any]]:
    for (row, name), result in standing.results.items():
        for key in result.figures:
            figure, difference = standing.figure(row, name, key), standing.difference(row, name, key)
            assert figure is not None
            yield {
                "set": name,
                "model": row,
                "steps": result.steps,
                "evaluations": result.evaluations,
                "pictures": result.count,
                "figure": key,
                **_ends("", figure),
                **_ends("difference_", difference),
                "published": standing.published(row, name, key),
            }


def _ends(prefix: str, found: Figure | Difference | None) -> dict[str, float | None]:
    names = [f"{prefix}value" if not prefix else prefix.rstrip("_"), f"{prefix}low", f"{prefix}high"]
    if found is None:
        return dict.fromkeys(names)
    reach = found.reach
    ends = [None, None] if reach is None else [found.value - reach, found.value + reach]
    return {
        name: None if each is None else float(f"{each:.6g}")
        for name, each in zip(names, [found.value, *ends], strict=True)
    }
