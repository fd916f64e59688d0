"""A comparison as one self-contained HTML page, in the colours of the report: it needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm.evaluation import page as look
from cdm.evaluation.theme import DARK, LIGHT
from cdm.experiments.comparison import Compared, Entry
from cdm.experiments.curves import colour, curves
from cdm.experiments.figures import Figure
from cdm.experiments.pictures import Pictures, Place, pictures_of, prompt_of, shown
from cdm.experiments.tables import CHANCE, number, remarks
from cdm.measures import Quantity, basics, by_judge

MORE = ("precision", "recall", "diversity")
"""Figures of the second table, which have no intervals."""
PROMPTS = 8
"""Most prompts whose pictures are shown."""


@dataclass(frozen=True)
class Tile:
    """A picture of one experiment, or that there is none."""

    name: str
    css: str
    """The class that has its colour."""
    source: str | None
    """A data URI."""


def write_page(compared: Compared, out: Path) -> list[str]:
    """Write the page to `out`, and return what it lacks, a line each."""
    pictures = {entry.name: pictures_of(entry.results) for entry in compared.entries}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(compared, pictures), encoding="utf-8")
    return [f"{name}: {each.problem}" for name, each in pictures.items() if each.problem]


def render(compared: Compared, pictures: Mapping[str, Pictures]) -> str:
    """The page; `pictures` by the name of the experiment."""
    return look.render(
        "comparison.html.j2",
        Path(__file__).parent,
        title=_title(compared),
        baseline=compared.baseline.results.revision.title,
        entries=[
            {"name": each.name, "css": f"e{index}", "changed": each.changed, "baseline": not index}
            for index, each in enumerate(compared.entries)
        ],
        remarks=remarks(compared),
        missing=[(name, each.problem) for name, each in pictures.items() if each.problem],
        explained=any(each.relation.comparable for each in compared.others),
        chance=CHANCE,
        tables=[_table(compared, quantity) for quantity in compared.quantities],
        more=_more(compared),
        training=_training(compared),
        steps=compared.steps,
        chosen=_usual(compared.steps),
        curves=[
            {"title": quantity.title, "light": look.uri(light), "dark": look.uri(dark)}
            for quantity in compared.quantities
            for light, dark in [curves(compared, quantity)]
        ],
        teacher=compared.baseline.results.full,
        prompts=_prompts(compared, pictures),
        same_noise=all(each.relation.paired for each in compared.others),
        themes=[
            (theme, {f"e{index}": colour(index, theme) for index in range(len(compared.entries))})
            for theme in (LIGHT, DARK)
        ],
    )


def _title(compared: Compared) -> str:
    names = [each.name for each in compared.entries]
    if len(names) > 3:
        return f"{len(names)} experiments side by side"
    return " and ".join(names) if len(names) < 3 else f"{names[0]}, {names[1]} and {names[2]}"


def _usual(steps: list[int]) -> int:
    """The number of steps whose pictures are seen first: 4, or the nearest below."""
    return max((each for each in steps if each <= 4), default=steps[0])


def _table(compared: Compared, quantity: Quantity) -> dict[str, Any]:
    """A figure of all students: a row an experiment, a column a number of steps."""
    rows = []
    for index, entry in enumerate(compared.entries):
        cells = [_cell(compared, entry, steps, quantity) for steps in compared.steps]
        rows.append({"name": entry.name, "css": f"e{index}", "cells": cells})
    teacher = compared.teacher(quantity.key)
    return {
        "quantity": quantity,
        "rows": rows,
        "teacher": None if teacher is None else _value(teacher, quantity),
    }


def _cell(compared: Compared, entry: Entry, steps: int, quantity: Quantity) -> dict[str, str]:
    figure = entry.results.figure("student", steps, quantity.key)
    if figure is None:
        return {}
    found = _value(figure, quantity)
    difference = compared.difference(entry, steps, quantity.key)
    if difference is not None:
        found["mark"] = difference.mark(quantity)
        amount = number(difference.value, quantity, like=figure.value)
        reach = (
            "" if difference.reach is None else f" ± {number(difference.reach, quantity, like=figure.value)}"
        )
        found["difference"] = f"{'+' if difference.value > 0 else ''}{amount}{reach}".replace("-", "\u2212")
    return found


def _value(figure: Figure, quantity: Quantity) -> dict[str, str]:
    reach = "" if figure.reach is None else number(figure.reach, quantity, like=figure.value)
    return {"value": number(figure.value, quantity), "reach": reach, "mark": "", "difference": ""}


def _more(compared: Compared) -> list[dict[str, Any]]:
    """Tables of the figures that have no intervals."""
    known = basics(all(by_judge(each.results.quality) for each in compared.entries))
    return [
        {
            "quantity": known[name],
            "rows": [
                {
                    "name": entry.name,
                    "css": f"e{index}",
                    "cells": [_plain(entry, steps, known[name]) for steps in compared.steps],
                }
                for index, entry in enumerate(compared.entries)
            ],
        }
        for name in MORE
        if any(
            name in each.results.row("student", steps) for each in compared.entries for steps in compared.steps
        )
    ]


def _plain(entry: Entry, steps: int, quantity: Quantity) -> str:
    row = entry.results.row("student", steps)
    return number(row[quantity.key], quantity) if quantity.key in row else "-"


def _training(compared: Compared) -> list[dict[str, Any]]:
    def figure(entry: Entry, name: str) -> str:
        value = entry.results.headline.get(f"train {name}")
        return "-" if value is None else f"{value:,.0f}"

    return [
        {
            "name": each.name,
            "css": f"e{index}",
            "seconds": figure(each, "seconds"),
            "forwards": figure(each, "forwards"),
        }
        for index, each in enumerate(compared.entries)
    ]


def _prompts(compared: Compared, pictures: Mapping[str, Pictures]) -> list[dict[str, Any]]:
    """For each prompt and number of steps the teacher's full-length picture and those of all students.

    The prompts are the baseline's, or those of the first experiment that has pictures; where others had other prompts,
    their pictures are left out.
    """
    teacher = compared.baseline.results.full
    with_pictures = [each for each in compared.entries if pictures[each.name].png]
    if not with_pictures:
        return []
    first = pictures[with_pictures[0].name].png
    texts = {place.prompt: prompt_of(png) for place, png in first.items()}
    return [
        {
            "text": texts[prompt],
            "teacher": Tile(
                f"teacher, {teacher} steps", "teacher", _uri(first.get(Place(prompt, "teacher", teacher)))
            ),
            "students": {
                steps: [
                    Tile(entry.name, f"e{index}", _of(pictures[entry.name], prompt, steps, texts[prompt]))
                    for index, entry in enumerate(compared.entries)
                ]
                for steps in compared.steps
            },
        }
        for prompt in sorted(texts)[:PROMPTS]
    ]


def _of(pictures: Pictures, prompt: int, steps: int, text: str) -> str | None:
    """The student's picture, if it is of that prompt."""
    png = pictures.png.get(Place(prompt, "student", steps))
    return _uri(png) if png is not None and prompt_of(png) == text else None


def _uri(png: bytes | None) -> str | None:
    return None if png is None else look.uri(shown(png))
