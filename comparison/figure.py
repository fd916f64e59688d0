"""Figures of a table: every metric against evaluations, or what each variant changes in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cdm.evaluation.plots import as_png, log_scale, style
from cdm.evaluation.theme import LIGHT, Theme
from cdm.measures import Quantity
from comparison.collect import METRICS, Collected
from comparison.design import Table
from comparison.results import Summary, TeacherResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
MARKERS = "osD^vp"
LINES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)))
CHANGES_AT = (2, 4, 8)
"""Evaluations at which changes are shown, where they were measured."""
REACH = 2.0
"""Changes are shown up to so many times what four of five of them keep within; the rest are arrows at the edge."""
SPREAD = 0.34
"""Of an evaluation: over so much the methods' points are spread, so that their intervals do not hide each other."""


def draw(found: Collected, table: Table, theme: Theme = LIGHT) -> bytes:
    """A PNG with a panel for each metric that was measured; the same input gives the same bytes."""
    summaries = found.tables[table]

    def panel(axes: Axes, metric: Quantity) -> None:
        _panel(axes, summaries, found.comparison.reference, metric, theme)
        if found.teacher is not None:
            _teacher(axes, found.teacher, max(found.comparison.steps), metric, theme)
        axes.set_xticks(sorted(found.comparison.steps))
        axes.set_xlabel("network evaluations a picture")

    legend = math.ceil((len(summaries) + 2) / COLUMNS)
    return _paint(summaries, panel, (4.9, 3.9), (0.0, 0.27 * legend), COLUMNS, theme)


def _paint(
    summaries: Sequence[Summary],
    panel: Callable[[Axes, Quantity], None],
    size: tuple[float, float],
    margin: tuple[float, float],
    legend_columns: int,
    theme: Theme,
    **options: Any,
) -> bytes:
    """A PNG with a panel for each metric of `summaries`, of this `size`, in inches as the `margin` around all is."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = {name for each in summaries for row in each.first.rows.values() for name in row}
    metrics = [metric for metric in METRICS if metric.key in measured]
    columns = min(COLUMNS, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    with mpl.rc_context(style(theme)):
        whole = (size[0] * columns + margin[0], size[1] * lines + margin[1])
        figure = Figure(figsize=whole, layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False, **options).flatten()
        for axes, metric in zip(every, metrics, strict=False):
            panel(axes, metric)
        for axes in every[len(metrics) :]:
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=legend_columns, borderaxespad=0.4)
        return as_png(figure)


def _panel(axes: Axes, summaries: Sequence[Summary], reference: str, metric: Quantity, theme: Theme) -> None:
    looks = zip(
        range(len(summaries)),
        cycle(theme.series),
        cycle(MARKERS),
        (line for line in cycle(LINES) for _ in theme.series),
        strict=False,
    )
    values: list[float] = []
    for summary, (index, colour, marker, line) in zip(summaries, looks, strict=True):
        shift = SPREAD * ((index + 0.5) / len(summaries) - 0.5)
        points = [
            (summary.evaluations(key) + shift, summary.over_seeds(key, metric.key))
            for key in summary.first.rows
        ]
        known = [(x, point.mean, point.half or 0.0) for x, point in points if point is not None]
        if not known:
            continue
        x, y, half = zip(*known, strict=True)
        values += y
        is_reference = summary.method == reference
        low = [min(h, 0.9 * v) if metric.better == "low" else h for v, h in zip(y, half, strict=True)]
        axes.errorbar(
            x,
            y,
            yerr=[low, half],
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=3.0 if is_reference else 1.6,
            markersize=7.5 if is_reference else 5.5,
            markeredgecolor=theme.ground,
            elinewidth=1.1,
            zorder=3 if is_reference else 2,
            label=summary.title,
        )
    axes.set_title(f"{metric.title}  {metric.arrow}".rstrip())
    if metric.better == "low" and values and min(values) > 0:
        log_scale(axes, max(values) / min(values))


def _teacher(axes: Axes, teacher: TeacherResult, most: int, metric: Quantity, theme: Theme) -> None:
    """The guided teacher at as few evaluations, and a line at its full length; the axis stays the students'."""
    low, high = axes.get_ylim()
    rows = [row for row in teacher.guided.values() if metric.key in row]
    few = [row for row in rows if row["evaluations"] <= most]
    axes.plot(
        [row["evaluations"] for row in few],
        [row[metric.key] for row in few],
        color=theme.muted,
        marker="x",
        linestyle="dashdot",
        linewidth=1.4,
        label="Teacher, guided",
    )
    full = teacher.full
    if metric.key in full:
        axes.axhline(
            full[metric.key],
            color=theme.muted,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            zorder=1,
            label=f"Teacher at {full['evaluations']:.0f} evaluations",
        )
        low, high = min(low, full[metric.key]), max(high, full[metric.key])
    margin = 1.06 if metric.better == "low" else 1.0
    axes.set_ylim(low / margin, high * margin)


def draw_changes(found: Collected, table: Table, theme: Theme = LIGHT) -> bytes:
    """A PNG of how each method differs from the reference: a dot a seed, a mark for their mean, a panel a metric.

    Seeds are compared with the same seed of the reference. Distances are shown as multiples of its, others as
    differences; what is far from all others is an arrow at the edge.
    """
    reference = found.reference(table)
    others = [each for each in found.tables[table] if each is not reference]
    assert reference is not None, "compared with the reference"
    keys = [f"steps{steps}" for steps in CHANGES_AT if f"steps{steps}" in reference.first.rows]

    def panel(axes: Axes, metric: Quantity) -> None:
        _changes(axes, others, reference, keys, metric, theme)
        axes.set_yticks(range(len(others)), [each.title for each in others])
        axes.set_ylim(len(others) - 0.5, -0.5)

    size = (3.9, 1.1 + 0.42 * len(others))
    return _paint([reference], panel, size, (2.2, 0.4), len(keys), theme, sharey=True)


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
    for place, (key, colour, marker) in enumerate(zip(keys, theme.series, MARKERS, strict=False)):
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
