"""A judging as one self-contained HTML page, in the colours of the report: it needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdm.evaluation import page as look
from cdm.evaluation.theme import DARK, LIGHT
from cdm.experiments.curves import colour
from cdm.experiments.pictures import prompt_of, shown
from cdm.experiments.tables import CHANCE, number
from cdm.judging import tables
from cdm.judging.places import Places
from cdm.judging.standing import Standing
from cdm.measures import Quantity

PROMPTS = 8
"""Most prompts of a set whose pictures are shown."""
SMALL = 128
"""Pixels on a side up to which a picture is enlarged without blur."""


def render(standing: Standing, places: Places) -> str:
    """The page; pictures that are not on this disk are left out."""
    judging = standing.judging
    sets = [name for name in judging.sets if standing.rows(name)]
    return look.render(
        "judging.html.j2",
        Path(__file__).parent,
        title=f"{len(judging.rows)} models side by side" if len(judging.rows) > 1 else "A model, judged",
        reference=judging.models[judging.reference].title,
        css={row: f"e{index}" for index, row in enumerate(judging.rows)},
        sets=[_set(standing, places, name) for name in sets],
        verdict=standing.verdict(),
        agrees=all(each.outcome == "agrees" for each in standing.checks()),
        checks=[_check(standing, each) for each in standing.checks()],
        gaps=tables.gaps(standing),
        chance=CHANCE.partition(". ")[0] + ".",
        themes=[
            (theme, {f"e{index}": colour(index, theme) for index in range(len(judging.rows))})
            for theme in (LIGHT, DARK)
        ],
    )


def _check(standing: Standing, check: Any) -> dict[str, str]:
    return {
        "title": standing.judging.models[check.row].title,
        "figure": check.quantity.title,
        "measured": tables.value(check.measured, check.quantity),
        "published": number(check.published, check.quantity),
        "tolerance": f"{check.tolerance:g}",
        "outcome": check.outcome,
    }


def _set(standing: Standing, places: Places, name: str) -> dict[str, Any]:
    quantities = standing.quantities(name)
    rows = standing.rows(name)
    return {
        "name": name,
        "heading": tables.heading(standing, name),
        "quantities": quantities,
        "rows": [_row(standing, row, name, quantities) for row in rows],
        "published": [_published_row(standing, row, name, quantities) for row in standing.published_rows(name)],
        "measured_by": _measured_by(standing, name),
        "prompts": _prompts(standing, places, name, rows),
    }


def _measured_by(standing: Standing, name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in standing.rows(name):
        found |= standing.results[row, name].measured_by
    return found


def _row(standing: Standing, row: str, name: str, quantities: Sequence[Quantity]) -> dict[str, Any]:
    result = standing.results[row, name]
    return {
        "row": row,
        "title": standing.judging.models[row].title,
        "steps": result.steps,
        "evaluations": result.evaluations,
        "cells": [_cell(standing, row, name, each) for each in quantities],
    }


def _cell(standing: Standing, row: str, name: str, quantity: Quantity) -> dict[str, str]:
    figure = standing.figure(row, name, quantity.key)
    published = standing.published(row, name, quantity.key)
    found = {"value": "", "reach": "", "mark": "", "difference": "", "published": ""}
    if published is not None:
        found["published"] = number(published, quantity)
    if figure is None:
        return found
    found["value"] = number(figure.value, quantity)
    if figure.reach is not None:
        found["reach"] = number(figure.reach, quantity, like=figure.value)
    difference = standing.difference(row, name, quantity.key)
    if difference is not None:
        found["mark"] = difference.mark(quantity)
        found["difference"] = tables.change(difference, quantity, figure.value)
    return found


def _published_row(standing: Standing, row: str, name: str, quantities: Sequence[Quantity]) -> dict[str, Any]:
    figures = [standing.published(row, name, each.key) for each in quantities]
    cells = [
        "" if found is None else number(found, each) for found, each in zip(figures, quantities, strict=True)
    ]
    return {"title": standing.judging.models[row].title, "cells": cells}


def _prompts(standing: Standing, places: Places, name: str, rows: Sequence[str]) -> list[dict[str, Any]]:
    """For each prompt the pictures of all rows, from the same noise."""
    files = {row: {path.name: path for path in places.pictures(row, name).glob("*.png")} for row in rows}
    first = next((files[row] for row in rows if files[row]), {})
    found = []
    for file in sorted(first)[:PROMPTS]:
        pngs = {row: files[row][file].read_bytes() if file in files[row] else None for row in rows}
        small = max(size(first[file])) <= SMALL
        found.append(
            {
                "text": prompt_of(first[file].read_bytes()),
                "small": small,
                "tiles": [
                    {
                        "row": row,
                        "title": standing.judging.models[row].title,
                        "source": None if png is None else look.uri(shown(png)),
                    }
                    for row, png in pngs.items()
                ],
            }
        )
    return found


def size(png: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    from PIL import Image

    with Image.open(png) as image:
        return image.size
