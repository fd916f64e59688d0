"""Figures of a table: every metric against evaluations, or what each variant changes in it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cdm.evaluation.plots import as_png, log_scale, style
from cdm.evaluation.theme import LIGHT, MARKERS, Theme
from cdm.measures import Quantity
from comparison.collect import METRICS, Collected
from comparison.design import Table
from comparison.results import Summary, TeacherResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LABEL, PANEL, HEAD = 1.75, (2.12, 1.3), 0.9
"""Inches: width of the methods' names, width and height of a panel, height of legend and headings."""
WRAP = 18
"""Characters of a line of a method's name."""
TICKS = (1, 2, 4, 6, 8)
SMALL: dict[Any, Any] = {
    "lines.linewidth": 1.7,
    "lines.markersize": 6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.titlepad": 8,
    "axes.titlesize": 11,
}
"""Settings of matplotlib for small panels."""
CHANGES_AT = (2, 4, 8)
"""Evaluations at which changes are shown, where they were measured."""
REACH = 2.0
"""Changes are shown up to so many times what four of five of them keep within; the rest are arrows at the edge."""


def draw(found: Collected, table: Table, theme: Theme = LIGHT) -> bytes:
    """A PNG with a row for each method and a column for each metric; the same input gives the same bytes.

    A panel has one method, in its own colour, over the reference and the teacher. Panels of a column share their axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    summaries, reference = found.tables[table], found.reference(table)
    others = [each for each in summaries if each is not reference] or summaries
    metrics = _measured(summaries)
    steps = found.comparison.steps
    with mpl.rc_context({**style(theme), **SMALL}):
        size = (LABEL + PANEL[0] * len(metrics), HEAD + PANEL[1] * len(others))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(others), len(metrics), squeeze=False, sharex=True, sharey="col")
        for column, metric in enumerate(metrics):
            for row, summary in enumerate(others):
                axes = panels[row, column]
                if found.teacher is not None:
                    _teacher(axes, found.teacher, max(steps), metric, theme)
                if reference is not None:
                    _curve(axes, reference, metric, look(found, reference.method, theme), 0.5)
                _curve(axes, summary, metric, look(found, summary.method, theme), 1.0)
            panels[0, column].set_title(f"{metric.title}  {metric.arrow}".rstrip())
            _scale(panels[0, column], summaries, found.teacher, metric)
            panels[-1, column].set_xticks(TICKS, [str(tick) for tick in TICKS])
        for summary, axes in zip(others, panels[:, 0], strict=True):
            title = "\n".join(textwrap.wrap(summary.title, WRAP))
            axes.set_ylabel(
                title,
                rotation=0,
                ha="right",
                va="center",
                color=look(found, summary.method, theme)[0],
                weight="bold",
            )
        figure.supxlabel("network evaluations a picture", color=theme.muted, fontsize=10)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles[:-1], labels[:-1], loc="outside upper left", ncols=3, borderaxespad=0.4)
        return as_png(figure)


def look(found: Collected, method: str, theme: Theme) -> tuple[str, str]:
    """The colour and the marker of a method, the same in all figures; the reference's are CDM's."""
    comparison = found.comparison
    return theme.method("cdm" if method == comparison.reference else method, list(comparison.methods))


def _measured(summaries: Sequence[Summary]) -> list[Quantity]:
    measured = {name for each in summaries for row in each.first.rows.values() for name in row}
    return [metric for metric in METRICS if metric.key in measured]


def _curve(axes: Axes, summary: Summary, metric: Quantity, shown: tuple[str, str], alpha: float) -> None:
    """A method's means over seeds, with their intervals."""
    points = [(summary.evaluations(key), summary.over_seeds(key, metric.key)) for key in summary.first.rows]
    known = [(x, point.mean, point.half or 0.0) for x, point in points if point is not None]
    if not known:
        return
    x, y, half = zip(*known, strict=True)
    low = [min(h, 0.9 * v) if metric.better == "low" else h for v, h in zip(y, half, strict=True)]
    axes.errorbar(
        x,
        y,
        yerr=[low, half],
        color=shown[0],
        marker=shown[1],
        markeredgecolor=axes.get_facecolor(),
        elinewidth=1.0,
        alpha=alpha,
        zorder=2 + alpha,
        label=summary.title,
    )


def _scale(axes: Axes, summaries: Sequence[Summary], teacher: TeacherResult | None, metric: Quantity) -> None:
    """The axis of a column: all students' means and the full teacher; its few evaluations may leave it."""
    estimates = [each.over_seeds(key, metric.key) for each in summaries for key in each.first.rows]
    values = [estimate.mean for estimate in estimates if estimate is not None]
    if teacher is not None and metric.key in teacher.full:
        values.append(teacher.full[metric.key])
    low, high = min(values), max(values)
    if metric.better == "low" and low > 0:
        axes.set_ylim(low / 1.5, high * 1.5)
        log_scale(axes, high / low)
    else:
        margin = 0.12 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _teacher(axes: Axes, teacher: TeacherResult, most: int, metric: Quantity, theme: Theme) -> None:
    """The guided teacher at as few evaluations, and a line at its full length."""
    rows = [row for row in teacher.guided.values() if metric.key in row and row["evaluations"] <= most]
    axes.plot(
        [row["evaluations"] for row in rows],
        [row[metric.key] for row in rows],
        color=theme.teacher,
        marker="s",
        markersize=4,
        linewidth=1.1,
        alpha=0.4,
        label="Teacher, guided",
    )
    full = teacher.full
    if metric.key in full:
        axes.axhline(
            full[metric.key],
            color=theme.teacher,
            linewidth=1.1,
            linestyle=(0, (4, 3)),
            zorder=1,
            label=f"Teacher at {full['evaluations']:.0f} evaluations",
        )


def draw_changes(found: Collected, table: Table, theme: Theme = LIGHT) -> bytes:
    """A PNG of how each method differs from the reference: a dot a seed, a mark for their mean, a panel a metric.

    Seeds are compared with the same seed of the reference. Distances are shown as multiples of its, others as
    differences; what is far from all others is an arrow at the edge.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    reference = found.reference(table)
    others = [each for each in found.tables[table] if each is not reference]
    assert reference is not None, "compared with the reference"
    keys = [f"steps{steps}" for steps in CHANGES_AT if f"steps{steps}" in reference.first.rows]
    metrics = _measured([reference])
    columns = min(COLUMNS, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    with mpl.rc_context(style(theme)):
        size = (3.9 * columns + 2.2, (1.1 + 0.42 * len(others)) * lines + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
        for axes, metric in zip(every, metrics, strict=False):
            _changes(axes, others, reference, keys, metric, theme)
            axes.set_yticks(range(len(others)), [each.title for each in others])
            axes.set_ylim(len(others) - 0.5, -0.5)
        for axes in every[len(metrics) :]:
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(keys), borderaxespad=0.4)
        return as_png(figure)


def _changes(
    axes: Axes,
    others: Sequence[Summary],
    reference: Summary,
    keys: Sequence[str],
    metric: Quantity,
    theme: Theme,
) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    ratio = metric.better == "low"
    # In the logarithm of a multiple as in a difference, 0 is no change.
    into, back = (math.log, math.exp) if ratio else (float, float)
    found = {
        (key, row): [into(change) for change in other.changes(reference, key, metric.key, ratio)]
        for key in keys
        for row, other in enumerate(others)
    }
    means = {place: fmean(changes) for place, changes in found.items() if changes}
    reach = _reach([abs(change) for changes in found.values() for change in changes])
    axes.axvline(back(0), color=theme.muted, linewidth=1.2, zorder=1)
    for place, (key, number, marker) in enumerate(zip(keys, (2, 3, 4), MARKERS, strict=False)):
        colour = theme.series[number]
        mark: dict[str, Any] = {
            "color": colour,
            "markersize": 6.5,
            "markeredgecolor": theme.ground,
            "clip_on": False,
        }
        shift = 0.5 * ((place + 0.5) / len(keys) - 0.5)
        rows = [row for row in range(len(others)) if (key, row) in means]
        for row in rows:
            seeds = [back(change) for change in found[key, row]]
            axes.plot(seeds, [row + shift] * len(seeds), ".", color=colour, markersize=4, alpha=0.6, zorder=2)
            mean = means[key, row]
            if abs(mean) > reach:
                arrow = "<" if mean < 0 else ">"
                axes.plot(back(math.copysign(reach, mean)), row + shift, arrow, **mark)
        shown = [row for row in rows if abs(means[key, row]) <= reach]
        evaluations = reference.evaluations(key)
        label = f"{evaluations} evaluation" + "s" * (evaluations > 1)
        x, y = [back(means[key, row]) for row in shown], [row + shift for row in shown]
        axes.plot(x, y, marker, linestyle="none", label=label, **mark)
    for row in range(1, len(others), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=theme.line, alpha=0.35, linewidth=0, zorder=0)
    axes.grid(visible=False, axis="y")
    if ratio:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    goal = {"high": "; more is better", "low": "; less is better", None: ""}[metric.better]
    axes.set_xlim(back(-1.05 * reach), back(1.05 * reach))
    axes.set_title(metric.title, loc="left")
    axes.set_xlabel(f"{'times' if ratio else 'more than'} {reference.title}'s{goal}")


def _reach(changes: Sequence[float]) -> float:
    """How far from no change an axis goes, in both directions, for changes of these sizes."""
    usual = sorted(changes)[int(0.8 * (len(changes) - 1))] if changes else 0.0
    return min(REACH * usual, max(changes, default=0.0)) or 1.0
