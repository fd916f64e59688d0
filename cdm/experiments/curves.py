"""Curves of several experiments over each other, as PNGs on light and on dark ground."""

from __future__ import annotations

from cdm.evaluation.plots import as_png, log_scale, style
from cdm.evaluation.theme import DARK, LIGHT, Theme
from cdm.experiments.comparison import Compared, Entry
from cdm.measures import Quantity

MARKERS = "oD^vPX"
APART = 0.05
"""Doublings of the number of steps by which points of neighbouring experiments are drawn apart."""
TEACHER = 1
"""The place of the teacher's colour among those of a theme."""


def colour(index: int, theme: Theme) -> str:
    """Of the experiment at `index`; the baseline has the student's, and none has the teacher's."""
    free = [each for place, each in enumerate(theme.series) if place != TEACHER]
    return free[index % len(free)]


def curves(compared: Compared, quantity: Quantity) -> tuple[bytes, bytes]:
    """A figure of all students against network evaluations, with its intervals, on light and on dark ground."""
    light, dark = (_draw(compared, quantity, theme) for theme in (LIGHT, DARK))
    return light, dark


def _draw(compared: Compared, quantity: Quantity, theme: Theme) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, entry in enumerate(compared.entries):
            points = _points(entry, quantity)
            if points:
                steps, y, reach = zip(*points, strict=True)
                aside = 2 ** (APART * (index - (len(compared.entries) - 1) / 2))
                x = [each * aside for each in steps]
                axes.errorbar(
                    x, y, yerr=reach, color=colour(index, theme), marker=MARKERS[index % len(MARKERS)],
                    elinewidth=1.2, capsize=2.5, zorder=10 - index,
                )  # fmt: skip
        teacher = compared.teacher(quantity.key)
        if teacher is not None:
            axes.axhline(teacher.value, color=theme.teacher, linestyle=(0, (4, 3)), linewidth=1.4, zorder=1)
        values = [y for entry in compared.entries for _, y, _ in _points(entry, quantity) if y > 0]
        axes.set_xscale("log", base=2)
        axes.set_xticks(compared.steps, [str(steps) for steps in compared.steps])
        axes.minorticks_off()
        axes.margins(x=0.06, y=0.1)
        if quantity.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        elif quantity.better == "low" and values:
            log_scale(axes, max(values) / min(values))
        axes.set_title(f"{quantity.title}  {quantity.arrow}")
        axes.set_xlabel("steps of the student")
        return as_png(figure)


def _points(entry: Entry, quantity: Quantity) -> list[tuple[int, float, float]]:
    """Steps, figure and half its interval."""
    found = [
        (steps, entry.results.figure("student", steps, quantity.key))
        for steps in entry.results.steps("student")
    ]
    return [(steps, figure.value, figure.reach or 0.0) for steps, figure in found if figure is not None]
