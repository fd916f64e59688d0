"""Curves of the comparison: distance to the truth against the number of evaluations."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdm.evaluation.plots import style
from cdm.evaluation.theme import LIGHT, Theme
from exact.experiment import STEPS, TEACHER, TRUTH, Row
from exact.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-4
"""Energy distances below this are drawn there: estimates around 0 may be negative."""

COLUMNS = 3
"""Panels beside each other."""

RANDOM = "dm-random"
"""Distribution matching at random levels, which is no method of the comparison."""


def compare(rows: Sequence[Row], path: Path, theme: Theme = LIGHT) -> None:
    """A panel for each group of methods, a curve for each method, with its range over seeds, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(METHODS[row.method].group for row in rows if row.method in METHODS))
    with mpl.rc_context(style(theme)):
        columns = min(COLUMNS, len(groups))
        lines = -(-len(groups) // columns)
        size = (5.1 * columns, 6.4 * lines)
        figure, panels = plt.subplots(
            lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
        for axes in panels.flat[len(groups) :]:
            axes.remove()
        for axes, group in zip(panels.flat, groups, strict=False):
            students = [row for row in rows if row.method in METHODS and METHODS[row.method].group == group]
            references = [
                row for row in rows if row.method in (TEACHER, TRUTH) and row.guidance == students[0].guidance
            ]
            _panel(axes, references + students, theme)
            axes.set_title(group, loc="left")
        for axes in panels[:, 0]:
            axes.set_ylabel("Energy distance to the truth")
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def _panel(axes: Axes, block: Sequence[Row], theme: Theme) -> None:
    floor = [abs(row.energy_distance) for row in block if row.method == TRUTH]
    axes.axhline(
        max(LEAST, statistics.fmean(floor)), color=theme.line, linewidth=6, zorder=0, label="true samples"
    )
    methods = [name for name in dict.fromkeys(row.method for row in block) if name not in (TEACHER, TRUTH)]
    # Dashed where the fake score is not level-aware, in a panel where others of that method are.
    both = len({METHODS[name].title for name in methods}) < len(methods)
    looks = {TEACHER: (theme.teacher, "s", "-")}
    for name in methods:
        dashed = both and not METHODS[name].distill.fake_knows_level
        dash = ":" if name.endswith("-unbounded") else "--" if dashed else "-"
        looks[name] = (*theme.method(_method(name), [RANDOM]), dash)
    for method, (colour, marker, dash) in looks.items():
        means, lows, highs = [], [], []
        for steps in STEPS:
            found = [row.energy_distance for row in block if row.method == method and row.steps == steps]
            means.append(max(LEAST, statistics.fmean(found)))
            lows.append(max(LEAST, min(found)))
            highs.append(max(LEAST, *found))
        axes.fill_between(STEPS, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.plot(STEPS, means, marker=marker, linestyle=dash, color=colour, label=_label(method))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.set_xlabel("Evaluations of the network" + ("" if block[0].guidance == 1 else " (teacher: twice)"))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.14), handlelength=5, markerscale=0.6)


def _method(name: str) -> str:
    """The method of a row, as the comparison has it; matching at fixed levels is what decoupled DMD adds CA to."""
    base = re.sub(r"(-guided|-level|-fast|-apart|-unbounded)+$", "", name)
    return {"dm-fixed": "decoupled-dmd", "dm": RANDOM}.get(base, base)


def _label(method: str) -> str:
    return "teacher" if method == TEACHER else METHODS[method].label
