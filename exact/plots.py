"""Curves of the comparison: distance to the truth against the number of evaluations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdm.evaluation.plots import style
from cdm.evaluation.theme import LIGHT, Theme
from exact.experiment import STEPS, TEACHER, TRUTH, Row, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-4
"""Energy distances below this are drawn there: estimates around 0 may be negative."""


def compare(rows: Sequence[Row], path: Path, theme: Theme = LIGHT) -> None:
    """A panel for each guidance, a curve for each method, with its range over seeds, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    guidances = sorted({row.guidance for row in rows})
    with mpl.rc_context(style(theme)):
        size = (6.4 * len(guidances), 6.2)
        figure, panels = plt.subplots(
            1, len(guidances), figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
        for axes, guidance in zip(panels[0], guidances, strict=True):
            block = [row for row in rows if row.guidance == guidance]
            _panel(axes, block, theme)
            axes.set(title="Without guidance" if guidance == 1 else f"Guidance {guidance:g}")
        panels[0, 0].set_ylabel("Energy distance to the truth")
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def _panel(axes: Axes, block: Sequence[Row], theme: Theme) -> None:
    floor = [abs(row.energy_distance) for row in block if row.method == TRUTH]
    axes.axhline(max(LEAST, statistics.fmean(floor)), color=theme.line, linewidth=6, zorder=0)
    styles = [(colour, dash) for dash in ("-", "--") for colour in theme.series if colour != theme.teacher]
    methods = [name for name in dict.fromkeys(row.method for row in block) if name not in (TEACHER, TRUTH)]
    looks = {TEACHER: (theme.teacher, "-"), **dict(zip(methods, styles, strict=False))}
    for method, (colour, dash) in looks.items():
        means, lows, highs = [], [], []
        for steps in STEPS:
            found = [row.energy_distance for row in block if row.method == method and row.steps == steps]
            means.append(max(LEAST, statistics.fmean(found)))
            lows.append(max(LEAST, min(found)))
            highs.append(max(LEAST, *found))
        axes.fill_between(STEPS, lows, highs, color=colour, alpha=0.12, linewidth=0)
        marker = "s" if method == TEACHER else "o"
        axes.plot(STEPS, means, marker=marker, linestyle=dash, color=colour, label=title_of(method, 1))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.set_xlabel("Evaluations of the network" + ("" if block[0].guidance == 1 else " (teacher: twice)"))
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
