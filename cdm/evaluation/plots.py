"""Curves as PNGs: quality against network evaluations, and the training log. The same input gives the same bytes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm.errors import CdmError
from cdm.evaluation.quality import Evaluation
from cdm.evaluation.theme import LIGHT, Theme
from cdm.measures import LOOKS, Quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"student": "o", "teacher": "s"}
NAMES = {"student": "Student", "teacher": "Teacher"}
PANELS = {
    "loss_fake": "Loss of the fake score",
    "loss_": "Losses of the student",
    "grad_norm_": "Gradient norms",
    "lr_": "Learning rates",
    "sigma": "Mean noise level of the anchors",
    "x0_deviation": "Deviation of the student's x0",
    "x0_distance": "Mean distance of the teacher's x0 from the student's",
    **{f"probe_{name}": f"Probe: {name.replace('_', ' ')} beside the teacher's" for name in LOOKS},
    "probe": "Probe: Fréchet distance of latents",
}
"""Title of the panel of the columns of a log that begin so."""
LOGARITHMIC = ("loss_fake", "loss_", "grad_norm_", "lr_", "probe")
"""Kinds of columns that span orders of magnitude."""
SPAN = 30
"""A moving average reaches over about this part (1/SPAN) of its curve."""
ROLES = {"x0_deviation": "student", "x0_distance": "teacher", "probe": "student"}
"""The model that a column of a log is about, where its name does not end with it."""
TERMS = {"loss_ca": 2, "loss_dm": 4, "loss_cdm": 5, "loss_sgmd": 2, "loss_consistency": 2}
"""Numbers of the colours of the student's losses, which they keep whatever others there are."""
OTHERS = (2, 4, 5, 3)
"""Numbers of the colours of what is about no model."""


def style(theme: Theme) -> dict[Any, Any]:
    """Settings of matplotlib."""
    return {
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.1,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "font.family": "DejaVu Sans",
        "lines.linewidth": 2.2,
        "lines.markersize": 7.5,
        "lines.solid_capstyle": "round",
    }


def quality(evaluation: Evaluation, theme: Theme = LIGHT) -> bytes:
    """Figures of student and teacher against network evaluations of one picture, with 95 % intervals."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    quantities = _measured(evaluation)
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(4.6 * len(quantities), 4.4), layout="constrained")
        panels = figure.subplots(1, len(quantities), squeeze=False)[0]
        for axes, quantity in zip(panels, quantities, strict=True):
            _quality_panel(axes, evaluation, quantity, theme)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.4)
        return as_png(figure)


def quality_panels(evaluation: Evaluation, theme: Theme = LIGHT) -> list[bytes]:
    """The panels of `quality`, a PNG each and without a legend, for a page that puts them side by side."""
    return [
        _alone(
            partial(_quality_panel, evaluation=evaluation, quantity=quantity, theme=theme), (4.6, 4.0), theme
        )
        for quantity in _measured(evaluation)
    ]


def _measured(evaluation: Evaluation) -> list[Quantity]:
    rows = [row for model in NAMES for row in evaluation.quality[model].values()]
    return [quantity for quantity in evaluation.headlines if any(quantity.key in row for row in rows)]


def _alone(draw: Callable[[Axes], None], size: tuple[float, float], theme: Theme) -> bytes:
    """A PNG of one panel, of this size in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return as_png(figure)


def _quality_panel(axes: Axes, evaluation: Evaluation, quantity: Quantity, theme: Theme) -> None:
    metric, is_distance = quantity.key, quantity.better == "low"
    ticks: set[int] = set()
    for model, label in NAMES.items():
        points = [
            (row["evaluations"], row[metric], evaluation.reaches[model][key].get(metric, 0.0), key)
            for key, row in evaluation.quality[model].items()
            if metric in row and (row[metric] > 0 or not is_distance)
        ]
        ticks |= {int(row["evaluations"]) for row in evaluation.quality[model].values()}
        if not points:
            continue
        x, y, error, keys = zip(*points, strict=True)
        low = [min(e, 0.9 * v) if is_distance else e for v, e in zip(y, error, strict=True)]
        axes.errorbar(
            x,
            y,
            yerr=[low, error],
            color=theme.model(model),
            marker=MARKERS[model],
            markeredgecolor=theme.ground,
            markeredgewidth=1.2,
            elinewidth=1.4,
            label=label,
        )
        side = -1 if (model == "student") == is_distance else 1
        for place, value, down, up, key in zip(x, y, low, error, keys, strict=True):
            axes.annotate(
                key.removeprefix("steps"),
                (place, value + (up if side > 0 else -down)),
                xytext=(0, 7 * side),
                textcoords="offset points",
                ha="center",
                va="bottom" if side > 0 else "top",
                fontsize=9,
                color=theme.model(model),
                path_effects=_halo(theme),
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.14)
    axes.set_title(f"{quantity.title}  {quantity.arrow}")
    if is_distance:
        log_scale(axes, math.inf)
        _reference_line(axes, evaluation.floor.get(metric), "real pictures", -1, theme)
    else:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        real = evaluation.quality.get("real", {}).get("halves", {})
        _reference_line(axes, real.get(metric), "real pictures", 1, theme)
    axes.set_xlabel("network evaluations a picture (labels: steps)")


def _halo(theme: Theme) -> list[Any]:
    """Keeps small letters readable on lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground=theme.ground)]


def _reference_line(axes: Axes, value: float | None, label: str, side: int, theme: Theme) -> None:
    if value is None:
        return
    axes.axhline(value, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        label,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4 * side),
        textcoords="offset points",
        ha="right",
        va="bottom" if side > 0 else "top",
        fontsize=9,
        color=theme.muted,
        path_effects=_halo(theme),
    )


def _plain_number(value: float, _: object) -> str:
    return f"{value:g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Points (iteration, value) by column of a training log; blank cells, of iterations without an update of that
    network, are left out. Raises CdmError if it is not such a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in rows[0] if name != "iteration"}
        for row in rows:
            for name, points in curves.items():
                if row[name]:
                    points.append((float(row["iteration"]), float(row[name])))
    except OSError as error:
        raise CdmError(f"{path}: cannot be read: {error.strerror}: run the stage `distill` first") from None
    except (ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise CdmError(
            f"{path}: not a training log (a CSV file with a column `iteration`): {error!r}"
        ) from None
    return {name: points for name, points in curves.items() if points}


def losses(curves: Mapping[str, Sequence[tuple[float, float]]], theme: Theme = LIGHT) -> bytes:
    """The training log: a panel for each kind of column, every point faint below a moving average."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _panels(curves)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(6.9 * columns, 3.5 * lines), layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, (title, names) in zip(every, panels.items(), strict=False):
            _log_panel(axes, title, {name: curves[name] for name in names}, theme)
        for axes in every[len(panels) :]:
            axes.set_axis_off()
        return as_png(figure)


def losses_panels(curves: Mapping[str, Sequence[tuple[float, float]]], theme: Theme = LIGHT) -> list[bytes]:
    """The panels of `losses`, a PNG each, for a page that puts them side by side."""
    return [
        _alone(
            partial(_log_panel, title=title, curves={name: curves[name] for name in names}, theme=theme),
            (6.9, 3.5),
            theme,
        )
        for title, names in _panels(curves).items()
    ]


def _log_panel(
    axes: Axes, title: str, curves: Mapping[str, Sequence[tuple[float, float]]], theme: Theme
) -> None:
    axes.set_title(title)
    for name, colour in colours(list(curves), theme).items():
        _curve(axes, name, curves[name], colour)
    values = [value for points in curves.values() for _, value in points if value > 0]
    if title in [PANELS[kind] for kind in LOGARITHMIC] and values and max(values) > min(values):
        log_scale(axes, max(values) / min(values))
    if len(curves) > 3:
        signed = any(value < 0 for points in curves.values() for _, value in points)
        axes.legend(loc="best" if signed else "upper right")  # what does not fall to 0 may lie anywhere
    elif len(curves) > 1:
        axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 0.99), handlelength=1.2, columnspacing=1.2)
    axes.set_xlabel("iteration")


def colours(names: Sequence[str], theme: Theme) -> dict[str, str]:
    """Colours of the columns of a log: that of the model or the term that a column is about, in every panel."""
    others = iter([*(theme.series[number] for number in OTHERS), theme.ink, theme.muted] * len(names))
    found = {}
    for name in names:
        model = ROLES.get(name, name.rsplit("_", 1)[-1])
        if model in ("student", "teacher", "fake"):
            found[name] = theme.model(model)
        elif name in TERMS:
            found[name] = theme.series[TERMS[name]]
        else:
            found[name] = theme.ink if name == "loss_regression" else next(others)
    return found


def _panels(curves: Mapping[str, object]) -> dict[str, list[str]]:
    """Column names by the title of their panel; what is of no known kind has a panel of its own."""
    titles = list(PANELS.values())
    panels: dict[str, list[str]] = {}
    for name in curves:
        title = next((title for prefix, title in PANELS.items() if name.startswith(prefix)), name)
        panels.setdefault(title, []).append(name)
    known = {title: panels[title] for title in titles if title in panels}
    return known | panels


def log_scale(axes: Axes, ratio: float) -> None:
    """A logarithmic axis that is readable too where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain_number)


def _curve(axes: Axes, name: str, points: Sequence[tuple[float, float]], colour: str) -> None:
    x, y = zip(*points, strict=True)
    if name.startswith("lr_"):
        axes.plot(x, y, color=colour, label=name)
    else:
        axes.plot(x, y, ".", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(x, moving_average(y, len(y) / SPAN), color=colour, label=name)


def moving_average(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, unbiased by its start: constants stay constant."""
    decay = 1 - 1 / max(1.0, span)
    weight = total = 0.0
    averages = []
    for value in values:
        weight, total = decay * weight + 1, decay * total + value
        averages.append(total / weight)
    return averages


def as_png(figure: Figure) -> bytes:
    """A figure as the same bytes on every run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
