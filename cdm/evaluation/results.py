"""Writing the results of an evaluation: the figures, the plots and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm.errors import CdmError
from cdm.evaluation import drift, plots, report, sheets
from cdm.evaluation.features import load_extractor
from cdm.evaluation.making import Making, read_training
from cdm.evaluation.metrics import Chosen, measure_chosen
from cdm.evaluation.quality import Evaluation, Row, evaluate
from cdm.evaluation.report import Picture, Pictures
from cdm.evaluation.samples import Samples, open_samples, read_real
from cdm.evaluation.theme import DARK, LIGHT, Theme
from cdm.families import get_family
from cdm.handover.snippet import diffusers_code
from cdm.models.manifest import TeacherManifest
from cdm.models.metric_models import without_missing
from cdm.models.student import Model, Origin
from cdm.params import Evaluate, Params
from cdm.system.circumstances import Circumstances
from cdm.system.files import Memory, digest_of, sha256, write_bytes, write_json, write_text

MOST_PROMPTS = 12
"""Prompts of which a report has the pictures, where sample.pictures are more."""


@dataclass(frozen=True)
class Results:
    """What an evaluation has found."""

    evaluation: Evaluation
    said: list[str] | None
    """Sentences about how pictures look beside the teacher's; None where no such measure was chosen."""


def write_results(
    params: Params,
    teacher: TeacherManifest,
    texts: list[str],
    samples: Path,
    log: Path,
    metrics: Path,
    pictures: Path,
    pages: Path,
    answers: Path,
    *,
    timing: Path,
    now: Circumstances,
) -> Results:
    """Measure the sample sets below `samples`; write the file `metrics` and the folders `pictures` and `pages`.

    `texts` are the evaluation prompts, `log` the CSV of the training and `timing` its times, `answers` a folder in
    which answers of scorers are kept for the next time, `now` the circumstances of this evaluation. Every input is
    read before anything is measured. Raises CdmError.
    """
    opened = open_samples(params.sample, params.latents, samples, texts)
    curves = plots.read_log(log)
    extractor = load_extractor(params.evaluate.judge)
    real = None if params.evaluate.real is None else read_real(Path(params.evaluate.real), texts)
    present, skipped = without_missing(params.evaluate)
    chosen = measure_chosen(present, opened, real, answers, seed=params.seed, runtime=params.runtime)
    evaluation = evaluate(opened, real, extractor, neighbours=params.evaluate.neighbours, seed=params.seed)
    figures = join(evaluation, chosen) | {"basis": basis(params.evaluate, opened, chosen)}
    said = None
    if chosen is not None and (found := drift.findings(chosen, opened, params.distill.losses)) is not None:
        figures["drift"] = drift.as_record(chosen, found)
        said = drift.in_words(chosen, found)
    if skipped:
        figures["skipped"] = skipped
    overview = _both(lambda theme: [sheets.overview(opened, theme=theme)])[0]
    drawn = {
        "overview": overview.light,
        "contact_sheet": sheets.contact_sheet(opened, params.sample.pictures),
        "quality": plots.quality(evaluation),
        "losses": plots.losses(curves),
    }
    shown = Pictures(
        overview,
        quality=_both(lambda theme: plots.quality_panels(evaluation, theme)),
        losses=_both(lambda theme: plots.losses_panels(curves, theme)),
        strips=sheets.strips(opened, min(params.sample.pictures, MOST_PROMPTS)),
    )
    made = Making(now, read_training(timing), opened.hashes)
    code = student_code(params, teacher, shown.strips.prompts[0])
    page = report.render(
        params, teacher, opened, evaluation, shown, made, code=code, chosen=chosen, said=said, skipped=skipped
    )
    for folder in (metrics.parent, pictures, pages):
        folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_bytes(pictures / f"{name}.png", picture)
    write_text(pages / "index.html", page)
    write_json(metrics, figures, lists_in_a_line=True)
    return Results(evaluation, said)


def join(evaluation: Evaluation, chosen: Chosen | None) -> dict[str, Any]:
    """What metrics/quality.json holds: the rows of `evaluation`, and behind them what was chosen.

    Chosen figures stand in the rows of their sample sets; `intervals` and `differences` are objects of their own, and
    so are the replicates that errors are worked out from, those over the samples' noise and those over the prompts.
    Raises CdmError if a scorer's figure has the name of another one.
    """
    replicates = {"noise": evaluation.replicates}
    if chosen is None:
        return {**evaluation.quality, "replicates": replicates}

    def row(model: str, key: str, figures: Row) -> Row:
        more = chosen.figures.get(model, {}).get(key, {})
        taken = figures.keys() & more.keys()
        if taken:
            raise CdmError(
                f"evaluate.scorers: a figure is called {min(taken)}, as another one: rename the scorer"
            )
        return {**figures, **more}

    rows = {
        model: {key: row(model, key, figures) for key, figures in sets.items()}
        for model, sets in evaluation.quality.items()
    }
    return {
        **rows,
        "intervals": chosen.intervals,
        "differences": chosen.differences,
        "replicates": replicates | {"prompts": chosen.replicates},
    }


def basis(section: Evaluate, samples: Samples, chosen: Chosen | None) -> dict[str, Any]:
    """What the figures are of: figures of two evaluations may be compared as far as these are equal.

    Hashes of the student, of the samples and of the teacher; the teacher's guidance; the prompts' hash, the samples of
    each and the seed of their noise; hashes of the judge and of the real pictures, null where there are none; the
    models of chosen measures.
    """
    teacher = samples.full.store
    return {
        **samples.hashes,
        "teacher": teacher.fact("model", str),
        "guidance_scale": teacher.fact("guidance_scale", float),
        "prompts": samples.prompts_sha256,
        "per_prompt": samples.per_prompt,
        "seed": teacher.fact("seed", int),
        "judge": None if section.judge is None else digest_of(Memory().folder(Path(section.judge))),
        "real": None if section.real is None else sha256(Path(section.real)),
        "models": dict(chosen.sources) if chosen is not None else {},
    }


def student_code(params: Params, teacher: TeacherManifest, prompt: str) -> str | None:
    """Python that draws `prompt` with the student; None where the teacher's configs are not on this machine."""
    local = Path(teacher.source)
    folder = teacher.downloaded() or (local if local.is_dir() else None)
    if folder is None:
        return None
    model = Model(get_family(teacher.family), folder, origin=Origin.from_training(teacher, params))
    return diffusers_code(model, "models/student", "lora" if params.distill.lora else "diffusers", prompt)


def _both(draw: Callable[[Theme], list[bytes]]) -> list[Picture]:
    """Pictures on light and on dark ground."""
    return [Picture(light, dark) for light, dark in zip(draw(LIGHT), draw(DARK), strict=True)]


def summary(results: Results) -> str:
    """The main figures as a table for a terminal, and how pictures look beside the teacher's."""
    evaluation = results.evaluation
    shown = [evaluation.basics["evaluations"], *evaluation.headlines]
    widths = {quantity.key: len(quantity.title) + 2 for quantity in shown}
    lines = [" " * 20 + "".join(f"{quantity.title:>{widths[quantity.key]}}" for quantity in shown)]
    for model, rows in evaluation.quality.items():
        for key, row in rows.items():
            figures = {**row, **(evaluation.floor if model == "real" else {})}
            cells = {
                quantity.key: report.number(figures[quantity.key], quantity) if quantity.key in figures else ""
                for quantity in shown
            }
            text = "".join(f"{cell:>{widths[name]}}" for name, cell in cells.items())
            lines.append(f"{report.row_name(model, key):20}{text}")
    return "\n".join([*lines, *(results.said or [])])
