"""Where a judging keeps what it makes: the same files below `judging/` and in the folder of `cdm judge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The files of a judging in a folder."""

    root: Path

    @property
    def cells(self) -> Path:
        """What every cell is made from, a small file each, so that one depends on its own and on no other."""
        return self.root / "cells"

    def drawing(self, row: str, name: str) -> Path:
        """What the pictures of a cell are drawn from."""
        return self.cells / "draw" / f"{row}-{name}.json"

    def measuring(self, name: str) -> Path:
        """What the pictures of a prompt set are measured with."""
        return self.cells / "measure" / f"{name}.json"

    def prompts(self, name: str) -> Path:
        """The prompts of a set."""
        return self.cells / "prompts" / f"{name}.json"

    def samples(self, row: str, name: str) -> Path:
        """The store of a cell's pictures."""
        return self.root / "samples" / row / name

    def pictures(self, row: str, name: str) -> Path:
        """PNGs of a few of them."""
        return self.root / "pictures" / row / name

    def result(self, row: str, name: str) -> Path:
        """The figures of a cell."""
        return self.root / "results" / name / f"{row}.json"

    @property
    def answers(self) -> Path:
        """What scorers have answered."""
        return self.root / "answers"

    @property
    def page(self) -> Path:
        return self.root / "page" / "index.html"
