"""Everything that an evaluation leaves behind: metrics/quality.json, the plots and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cdm.evaluation import plots, report, sheets
from cdm.evaluation.features import load_extractor
from cdm.evaluation.quality import Evaluation, evaluate
from cdm.evaluation.report import Picture, Teacher
from cdm.evaluation.samples import open_samples, read_real
from cdm.evaluation.theme import DARK, LIGHT, Theme
from cdm.params import Params
from cdm.store import write_json


def write_results(
    params: Params,
    teacher: Teacher,
    texts: list[str],
    samples: Path,
    log: Path,
    metrics: Path,
    pictures: Path,
    pages: Path,
) -> Evaluation:
    """Measure the sample sets below `samples`; write the file `metrics` and the folders `pictures` and `pages`.

    `texts` are the evaluation prompts, `log` the CSV of the training. Every input is read before anything is
    measured. Raises CdmError.
    """
    opened = open_samples(params, samples, texts)
    curves = plots.read_log(log)
    extractor = load_extractor(params.evaluate.judge)
    real = None if params.evaluate.real is None else read_real(Path(params.evaluate.real), texts)
    evaluation = evaluate(params, opened, real, extractor)
    drawn = {
        "overview": _both(lambda theme: sheets.overview(opened, theme=theme)),
        "contact_sheet": _both(lambda theme: sheets.contact_sheet(opened, params.sample.pictures, theme)),
        "quality": _both(lambda theme: plots.quality(evaluation, theme)),
        "losses": _both(lambda theme: plots.losses(curves, theme)),
    }
    page = report.render(params, teacher, opened, evaluation, drawn)
    for folder in (metrics.parent, pictures, pages):
        folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        (pictures / f"{name}.png").write_bytes(picture.light)
    (pages / "index.html").write_text(page, encoding="utf-8")
    write_json(metrics, evaluation.quality)
    return evaluation


def _both(draw: Callable[[Theme], bytes]) -> Picture:
    return Picture(draw(LIGHT), draw(DARK))


def summary(evaluation: Evaluation) -> str:
    """The main figures as a table for a terminal."""
    lines = [f"{'':20}{'evaluations':>12}{'Fréchet':>10}{'style':>10}{'all right':>11}"]
    for model, rows in evaluation.quality.items():
        for key, row in rows.items():
            figures = {**row, **(evaluation.floor if model == "real" else {})}
            cells = [
                report.number(figures[name], name) if name in figures else ""
                for name in ("frechet_distance", "style_distance", "attribute_accuracy")
            ]
            evaluations = row["evaluations"] or ""
            lines.append(
                f"{report.row_name(model, key):20}{evaluations:>12}{cells[0]:>10}{cells[1]:>10}{cells[2]:>11}"
            )
    return "\n".join(lines)
