"""What DVC is told of an experiment: a headline of about a dozen numbers, and the curves of quality against cost.

Both are excerpts of metrics/quality.json, which has everything.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cdm.errors import CdmError
from cdm.measures import HEADLINES, JUDGED, by_judge, quantities
from cdm.system.files import read_json, write_json, write_text

DIGITS = 4
"""Significant digits of a number of the headline."""
MOST_KINDS = 3
"""Kinds of figures of the student in a headline, such as distances: each is there at every number of steps."""
FRECHET, RIGHT = "frechet_distance", "attribute_accuracy"


def training_seconds(timing: Path) -> float:
    """The seconds of a training, from the file of times that the stage `distill` leaves; raises CdmError."""
    found = read_json(timing)
    seconds = found.get("seconds") if isinstance(found, dict) else None
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise CdmError(f"{timing}: missing or damaged: run the stage `distill`, which writes it")
    return float(seconds)


def write_headline(
    quality: Path, headline: Path, curves: Path, *, seconds: float, forwards: float
) -> dict[str, float]:
    """Write the files `headline` (JSON) and `curves` (CSV) from the figures in the file `quality`, and return the
    headline. `seconds` and `forwards` (forward-equivalents) are those of the training."""
    figures = read_json(quality)
    found = make_headline(figures, seconds=seconds, forwards=forwards)
    for path in (headline, curves):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(headline, found)
    write_text(curves, as_csv(figures))
    return found


def make_headline(figures: Mapping[str, Any], *, seconds: float, forwards: float) -> dict[str, float]:
    """The numbers by the names that tables show: `FD@4` is the student's Fréchet distance at 4 steps.

    `figures` is what metrics/quality.json holds. Of the teacher there are the figures at its full number of steps, the
    reference lines of the student's. A distance of other features than a judge's is called by what it is.
    """
    students, teachers = figures["student"], figures["teacher"]
    full = max(teachers, key=steps_of)
    names = kinds(figures)
    found = {
        f"{name}@{steps_of(key)}": students[key][figure]
        for figure, name in names.items()
        for key in sorted(students, key=steps_of)
        if figure in students[key]
    }
    own = "real" not in figures  # the teacher's samples are the reference: their own distance is 0
    found |= {
        f"teacher {name}@{steps_of(full)}": teachers[full][figure]
        for figure, name in names.items()
        if figure in teachers[full] and not (own and figure == FRECHET)
    }
    found |= {"train seconds": seconds, "train forwards": forwards}
    return {name: rounded(value) for name, value in found.items()}


def kinds(figures: Mapping[str, Any]) -> dict[str, str]:
    """The kinds of figures in a headline, and their names: with a judge its distance and share of right pictures
    first, without one the measures that `evaluate.metrics` and `evaluate.scorers` chose."""
    row = next(iter(figures["student"].values()))
    judged, real = by_judge(figures), "real" in figures
    distance = (
        ("FD" if real else "FD to teacher") if judged else ("pixel distance" if real else "pixels to teacher")
    )
    own = {FRECHET: distance} | ({RIGHT: "right"} if RIGHT in row else {})
    known = quantities()
    chosen = {
        key: known[key].title if key in known else key for key in row if key not in JUDGED and key != "count"
    }
    every = own | chosen if judged else chosen | own
    return dict(list(every.items())[:MOST_KINDS])


def rounded(value: float) -> float:
    """To 4 significant digits, as an integer from 1,000 on."""
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if abs(short) >= 10 ** (DIGITS - 1) else short


def as_csv(figures: Mapping[str, Any]) -> str:
    """Rows of student and teacher with their number of steps, evaluations a picture, and every figure.

    A figure that a row lacks is blank. The figures that plots show have a column in any case.
    """
    rows = [
        {"model": model, "steps": steps_of(key), **figures[model][key]}
        for model in ("student", "teacher")
        for key in sorted(figures[model], key=steps_of)
    ]
    always = ["model", "steps", "evaluations", *(quantity.key for quantity in HEADLINES)]
    names = dict.fromkeys([*always, *_names(rows)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [name for row in rows for name in row]


def steps_of(key: str) -> int:
    """4 of `steps4`."""
    return int(key.removeprefix("steps"))
