"""The report, one self-contained HTML file: the teacher, figures and their cost, pictures, curves, parameters.

Its dates and its machine are those of `Making`: the same results made in the same circumstances give the same bytes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from cdm.evaluation import making, page
from cdm.evaluation.making import Making
from cdm.evaluation.metrics import Bounds, Chosen
from cdm.evaluation.quality import Evaluation, Row
from cdm.evaluation.samples import Samples, SampleSet
from cdm.evaluation.sheets import Strips
from cdm.measures import HEADLINES, JUDGED, Quantity, quantities, steps_in_words
from cdm.models.manifest import TeacherManifest
from cdm.params import Params

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Picture:
    """PNG bytes of one picture on light and on dark ground."""

    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Pictures:
    """Everything drawn that a report shows."""

    overview: Picture
    quality: Sequence[Picture]
    losses: Sequence[Picture]
    strips: Strips


MAIN = ("evaluations", *(quantity.key for quantity in HEADLINES), "precision", "recall", "diversity")
"""Columns of the first table."""
MORE = tuple(key for key in JUDGED if key not in MAIN)
"""Columns of the second."""


@dataclass(frozen=True)
class Cell:
    """A figure, half of its 95 % interval, and whether it is the best of its column or near it."""

    value: str
    error: str = ""
    mark: Literal["best", "near", ""] = ""


def render(
    params: Params,
    teacher: TeacherManifest,
    samples: Samples,
    evaluation: Evaluation,
    pictures: Pictures,
    made: Making,
    *,
    code: str | None = None,
    chosen: Chosen | None = None,
    said: Sequence[str] | None = None,
    skipped: Mapping[str, str] | None = None,
) -> str:
    """The report. `code` is Python that draws the first of the prompts shown with the student; `said` are the sentences
    about how pictures look beside the teacher's, `skipped` why chosen measures are left out, by name."""
    rows = [row for model in evaluation.quality.values() for row in model.values()]
    attributes = next(iter(evaluation.attributes["student"].values()))
    main, more = (
        [evaluation.basics[key] for key in keys if any(key in row for row in rows)] for keys in (MAIN, MORE)
    )
    more += [Quantity(f"attribute:{name}", f"{name.capitalize()} right", percent=True) for name in attributes]
    return page.render(
        TEMPLATE,
        title=f"{_name(teacher)} in {_listed(params.sample.steps)} steps",
        lead=_lead(params, teacher),
        made=making.sentence(made),
        making=making.rows(made),
        cards=_cards(samples, evaluation),
        groups=_groups(evaluation, main + more),
        main_columns=main,
        more_columns=more,
        chosen=None if chosen is None else _chosen(chosen, samples),
        said=said,
        skipped=skipped or {},
        has_errors=any(errors for model in evaluation.errors.values() for errors in model.values()),
        floor=evaluation.floor,
        reference_text=_reference_text(samples, evaluation),
        method=_method(params, samples, evaluation),
        caveats=_caveats(evaluation),
        parameters=parameter_rows(params),
        overview=_uris(pictures.overview),
        quality=[_uris(each) for each in pictures.quality],
        losses=[_uris(each) for each in pictures.losses],
        prompts=pictures.strips.prompts,
        noises=pictures.strips.noises,
        across=pictures.strips.across,
        **_sets(samples, pictures.strips),
        code=code,
        command=f"cdm sample {shlex.quote(pictures.strips.prompts[0])} --steps 4 --seed 0 --out picture.png",
        guided=samples.guided,
    )


def _sets(samples: Samples, strips: Strips) -> dict[str, Any]:
    """The strips in the order that they are shown in: the teacher's from its full number of steps down, then the
    student's up; and which of the student's is wiped over the teacher at first."""
    pictures = dict(zip([id(each) for each in samples.sets], strips.files, strict=True))
    ordered = [*samples.teacher[::-1], *samples.student]
    return {
        "sets": [
            {
                "id": _set_id(each),
                "model": each.model,
                "steps": steps_in_words(each.steps),
                "evaluations": "1 evaluation" if each.evaluations == 1 else f"{each.evaluations} evaluations",
                "full": each is samples.full,
                "pixels": strips.small,
                "picture": page.uri(pictures[id(each)]),
                "column": 2 + index + (each.model == "student"),  # behind the prompts, and behind a gap
            }
            for index, each in enumerate(ordered)
        ],
        "counts": {"teacher": len(samples.teacher), "student": len(samples.student)},
        "shown": _set_id(_at_four(samples)),
    }


def _set_id(shown: SampleSet) -> str:
    return f"{shown.model}-{shown.key}"


def _at_four(samples: Samples) -> SampleSet:
    """The student at 4 steps, or at the nearest number below, else at its lowest."""
    few = [each for each in samples.student if each.steps <= 4]
    return few[-1] if few else samples.student[0]


def _chosen(chosen: Chosen, samples: Samples) -> dict[str, Any]:
    """Tables of the chosen measures, of their differences to the teacher, and of what measured them."""
    present = dict.fromkeys(name for sets in chosen.figures.values() for row in sets.values() for name in row)
    known = quantities()
    columns = [
        known.get(name, Quantity(name, name, meaning="a scorer of evaluate.scorers")) for name in present
    ]

    def reach(bounds: Bounds, model: str, key: str, name: str) -> str:
        """Half the interval that a list of numbers ends with; a difference may stand alone."""
        found = bounds.get(model, {}).get(key, {}).get(name, [])
        return _short((found[-1] - found[-2]) / 2) if len(found) > 1 else ""

    figures = {(model, key): row for model, sets in chosen.figures.items() for key, row in sets.items()}
    best = {column.key: _best(column, figures) for column in columns}
    rows = [
        {
            "model": model,
            "rows": [
                {
                    "name": row_name(model, key),
                    "cells": {
                        name: Cell(
                            _short(value),
                            reach(chosen.intervals, model, key, name),
                            "best" if value == best[name] else "",
                        )
                        for name, value in row.items()
                    },
                }
                for key, row in sets.items()
            ],
        }
        for model, sets in chosen.figures.items()
    ]
    paired = [
        {
            "name": row_name("student", key),
            "cells": {
                name: Cell(_short(values[0]), reach(chosen.differences, "student", key, name))
                for name, values in row.items()
            },
        }
        for key, row in chosen.differences.get("student", {}).items()
    ]
    both = [column for column in columns if any(column.key in row["cells"] for row in paired)]
    between = _between(chosen)
    return {
        "columns": columns,
        "groups": rows,
        "paired_columns": both,
        "paired": [{"model": "student", "rows": paired}] if both else [],
        "full": steps_in_words(samples.full.steps),
        "between_columns": [column for column in columns if column.key in chosen.between],
        "between": between,
        "prompts": chosen.prompts,
        "has_intervals": bool(chosen.intervals),
        "sources": chosen.sources,
    }


def _between(chosen: Chosen) -> list[dict[str, Any]]:
    """The row of a table: the student with more steps less that with few."""
    if chosen.steps is None:
        return []
    few, more = map(steps_in_words, chosen.steps)
    cells = {
        name: Cell(_short(found[0]), _short((found[2] - found[1]) / 2) if len(found) > 1 else "")
        for name, found in chosen.between.items()
    }
    return [{"model": "student", "rows": [{"name": f"{more} less {few}", "cells": cells}]}]


def _best(column: Quantity, figures: Mapping[tuple[str, str], Row]) -> float | None:
    values = [row[column.key] for row in figures.values() if column.key in row]
    match column.better:
        case "low":
            return min(values)
        case "high":
            return max(values)
    return None


def _short(value: float) -> str:
    """A figure of any size to three digits."""
    return (f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "\u2212")


def _name(teacher: TeacherManifest) -> str:
    return teacher.source.rstrip("/")


def _listed(numbers: list[int]) -> str:
    *rest, last = map(str, sorted(numbers))
    return f"{', '.join(rest)} and {last}" if rest else last


def _lead(params: Params, teacher: TeacherManifest) -> str:
    revision = f" at revision {teacher.revision}" if teacher.revision else ""
    terms = " + ".join(name.upper() if len(name) < 5 else name for name in params.distill.losses.weights)
    schedule = params.schedule
    if schedule.kind == "dynamic":
        levels = f"random schedules of {schedule.min_len} to {schedule.max_len} steps"
    else:
        levels = f"the fixed schedule {', '.join(f'{sigma:g}' for sigma in schedule.sigmas)}"
    return (
        f"A student of the same architecture ({teacher.parameters:,} parameters), distilled from"
        f" {_name(teacher)}{revision} with {terms} on {levels}: {params.distill.iterations:,} iterations of"
        f" {params.distill.batch_size} samples, seed {params.seed}. It needs no guidance."
    )


def _cards(samples: Samples, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The student, at 4 steps where it can be, beside the teacher."""
    student, full = _at_four(samples), samples.full
    ours, theirs = evaluation.quality["student"][student.key], evaluation.quality["teacher"]
    cards: list[dict[str, Any]] = [
        {
            "name": "Network evaluations a picture",
            "figure": f"{full.evaluations} → {student.evaluations}",
            "unit": f"student, {steps_in_words(student.steps)}",
            "rows": [
                (f"Teacher, {steps_in_words(full.steps)}", f"{full.evaluations // full.steps} a step"),
                (f"Student, {steps_in_words(student.steps)}", f"{student.evaluations // student.steps} a step"),
            ],
        }
    ]
    for column in evaluation.headlines:
        if column.key not in ours:
            continue
        compared = dict.fromkeys((full.key, student.key))
        rows = [
            (
                f"Teacher, {steps_in_words(int(key.removeprefix('steps')))}",
                number(theirs[key][column.key], column),
            )
            for key in compared
            if key in theirs
        ]
        cards.append(
            {
                "name": f"{column.title}\u00a0{column.arrow}",
                "figure": number(ours[column.key], column),
                "unit": f"student, {steps_in_words(student.steps)}",
                "rows": rows,
            }
        )
    return cards


def _groups(evaluation: Evaluation, columns: list[Quantity]) -> list[dict[str, Any]]:
    """Rows of the tables by model, with the best of student and teacher marked in each column."""
    figures = {
        (model, key): {
            **row,
            **{f"attribute:{name}": v for name, v in evaluation.attributes[model][key].items()},
        }
        for model, rows in evaluation.quality.items()
        for key, row in rows.items()
    }
    for place in figures.keys() & {("real", "halves")}:
        figures[place] |= evaluation.floor
    contest = {place: row for place, row in figures.items() if place[0] != "real"}
    marked = {column.key: marks(column, contest, evaluation) for column in columns}
    groups = []
    for model in evaluation.quality:
        rows: list[dict[str, Any]] = []
        for key in evaluation.quality[model]:
            errors = evaluation.reaches.get(model, {}).get(key, {})
            cells = {
                column.key: _cell(column, figures[model, key], errors, marked[column.key].get((model, key), ""))
                for column in columns
            }
            rows.append({"name": row_name(model, key), "cells": cells})
        groups.append({"model": model, "rows": rows})
    return groups


def row_name(model: str, key: str) -> str:
    """What a row is called in tables."""
    if model == "real":
        return "Real pictures"
    return f"{model.capitalize()}, {steps_in_words(int(key.removeprefix('steps')))}"


def marks(
    column: Quantity, figures: Mapping[tuple[str, str], Row], evaluation: Evaluation
) -> dict[tuple[str, str], Literal["best", "near", ""]]:
    """`best`, and `near` where the 95 % interval of the difference (taken as independent) reaches the best."""
    values = {place: row[column.key] for place, row in figures.items() if column.key in row}
    if column.better is None or not values:
        return {}
    best = min(values, key=lambda place: values[place] * (1 if column.better == "low" else -1))
    errors = {
        (model, key): row.get(column.key)
        for model, rows in evaluation.reaches.items()
        for key, row in rows.items()
    }
    found: dict[tuple[str, str], Literal["best", "near", ""]] = {}
    for place, value in values.items():
        error, best_error = errors.get(place), errors.get(best)
        if value == values[best]:
            found[place] = "best"
        elif (
            error is not None
            and best_error is not None
            and abs(value - values[best]) <= math.hypot(error, best_error)
        ):
            found[place] = "near"
    return found


def _cell(column: Quantity, row: Row, errors: Row, mark: Literal["best", "near", ""]) -> Cell | None:
    if column.key not in row:
        return None
    value = row[column.key]
    error = number(errors[column.key], column, like=value) if column.key in errors else ""
    return Cell(number(value, column), error, mark)


def number(value: float, quantity: Quantity, like: float | None = None) -> str:
    """A figure as text: shares in per cent, others to about three digits; an error with the digits of `like`."""
    if quantity.key == "evaluations":
        return f"{value:.0f}" if value else ""
    if quantity.percent:
        return f"{100 * value:.1f} %"
    size = abs(value if like is None else like)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}".replace(
        "-", "\u2212"
    )


def _reference_text(samples: Samples, evaluation: Evaluation) -> str:
    count = len(samples.full.store)
    if evaluation.reference == "real":
        return (
            f"Each row is {count:,} samples ({len(samples.texts)} prompts, {samples.per_prompt} of each) against"
            f" {evaluation.reference_count:,} held-out real pictures of the same prompts."
        )
    return (
        f"Each row is {count:,} samples ({len(samples.texts)} prompts, {samples.per_prompt} of each) against the"
        f" teacher's own samples of {samples.full.steps} steps from the same noise. They are the reference, so"
        " their own distance is 0."
    )


def _method(params: Params, samples: Samples, evaluation: Evaluation) -> list[tuple[str, str]]:
    count = len(samples.full.store)
    rows = [
        (
            "Samples",
            f"{count:,} a row: {len(samples.texts)} prompts, {samples.per_prompt} each, all rows on the same noise",
        ),
        ("Seed", str(params.seed)),
        ("Prompts, SHA-256", samples.prompts_sha256),
        (
            "Guidance of the teacher",
            f"{params.teacher.guidance_scale:g} (1 is none; else a step takes two evaluations)",
        ),
        ("Features", evaluation.features),
        (
            "Distances",
            "squared Fréchet distance of the Gaussians fitted to the features, each feature divided by its standard"
            " deviation over the reference",
        ),
        (
            "Precision, recall, density, coverage",
            f"balls to the {params.evaluate.neighbours} nearest neighbours, content features",
        ),
        (
            "Intervals",
            "95 %, of a jackknife over the samples' noise: the first samples of all prompts are left out together, then"
            " the second ones, and so on; by Student's t",
        ),
    ]
    if evaluation.reference == "real":
        rows.insert(4, ("Reference", f"{evaluation.reference_count:,} real pictures ({params.evaluate.real})"))
        rows.append(
            (
                "Real pictures",
                "what real pictures would get: they are split at random into halves of"
                f" {evaluation.reference_count // 2:,} (equally for each prompt), one is measured against the other,"
                " and the mean of 8 splits taken; the distances are scaled to the samples' count, because sampling"
                " errors add to a Fréchet distance in proportion to 1/n + 1/m. Accuracy and diversity are of all real"
                " pictures, the other figures are the halves' own",
            )
        )
    return rows


def _caveats(evaluation: Evaluation) -> list[str]:
    caveats = [
        "Figures compare rows of this report, and reports with the same features, prompts and counts. They are not the"
        " FID of other publications, which is measured with another network.",
        "A Fréchet distance grows as samples become fewer; even perfect ones do not reach 0. Precision, recall, density"
        " and coverage depend on the counts and on k.",
        "The intervals are over the noise alone: another training seed, other prompts or other real pictures"
        " would change the figures too. This is one training run.",
        "Distances to the teacher's samples are on the same noise, so that they may fall below those of two independent"
        " sets of the teacher.",
    ]
    real = evaluation.quality.get("real", {}).get("halves", {})
    if "attribute_accuracy" in real:
        caveats.append(
            "The accuracy is a classifier's opinion, which errs: of the real pictures it calls"
            f" {100 * real['attribute_accuracy']:.1f} % right. A model can score more by drawing only what is easy to"
            " read: look at recall and diversity beside it."
        )
    return caveats


def parameter_rows(params: Params) -> list[tuple[str, list[dict[str, str]]]]:
    """Every parameter that can change a result, by section: its key, its value as in YAML, its meaning."""
    values = params.model_dump(
        include={"seed", "teacher", "prompts", "latents", "schedule", "distill", "sample", "evaluate"}
    )
    return [(name, _flat(type(params), {name: value})) for name, value in values.items()]


def _flat(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> list[dict[str, str]]:
    rows = []
    for name, value in values.items():
        field = model.model_fields[name]
        if (
            isinstance(value, dict)
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            rows += _flat(field.annotation, value, f"{prefix}{name}.")
        else:
            meaning = " ".join((field.description or "").split())
            rows.append(
                {"key": prefix + name, "value": json.dumps(value, ensure_ascii=False), "meaning": meaning}
            )
    return rows


def _uris(picture: Picture) -> dict[str, str]:
    return {"light": page.uri(picture.light), "dark": page.uri(picture.dark)}
