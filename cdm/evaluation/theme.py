"""Colours and type of pictures, plots and report, on light and on dark ground.

Series colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METHODS = ("decoupled-dmd", "dmd2", "tdm", "phased-dmd", "sgmd", "consistency", "dmd")
"""Methods that CDM is compared with, in the order of their colours."""
MARKERS = "D^vpX*P"
"""Of methods: those of student and teacher, a circle and a square, are not among them."""


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb."""

    ground: str
    ink: str
    muted: str
    line: str
    student: str
    teacher: str
    fake: str
    """The fake score."""
    series: tuple[str, ...]
    """Colours of curves by number. The first two are those of student and teacher."""

    def model(self, name: str) -> str:
        """The colour of `student`, `teacher` or `fake`, which is the same in all pictures."""
        return {"student": self.student, "teacher": self.teacher, "fake": self.fake}[name]

    def method(self, name: str, more: Sequence[str] = ()) -> tuple[str, str]:
        """The colour and the marker of a method, the same in all figures; CDM's are those of the student.

        `more` are the names that a figure has besides those of `METHODS`, in an order that stays.
        """
        if name == "cdm":
            return self.student, "o"
        colours = [*self.series[2:5], self.ink, self.muted]
        known = [*METHODS, *(each for each in more if each not in METHODS)]
        row, column = divmod(known.index(name), len(colours))
        return colours[column], MARKERS[row % len(MARKERS)]


LIGHT = Theme(
    ground="#ffffff",
    ink="#1b1f24",
    muted="#68717b",
    line="#dfe3e8",
    student="#0072b2",
    teacher="#d55e00",
    fake="#cc79a7",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    ground="#161a1f",
    ink="#e8ebee",
    muted="#98a2ad",
    line="#30373f",
    student="#56b4e9",
    teacher="#f08a3c",
    fake="#dd9bc0",
    series=("#56b4e9", "#f08a3c", "#2cc29a", "#dd9bc0", "#f0c04a", "#8fa8ff"),
)


def font_file(bold: bool = False) -> Path:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts/ttf" / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
