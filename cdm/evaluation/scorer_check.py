"""A scorer on two pictures, before a run needs it: does it start, is its environment whole, is its answer one.

A scorer is one of `evaluate.scorers`, or a script of the folder `scorers`, whose docstring says how to install what it
needs: a paragraph that begins with "Install:".
"""

from __future__ import annotations

import ast
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdm.errors import CdmError, line
from cdm.evaluation.scorers import Answer, put
from cdm.models.metric_models import scorer_problem
from cdm.params import ScorerProcess
from cdm.system.commands import Command

PROMPTS = ("a red circle on white paper", "a blue square on grey paper")
"""What the two pictures show."""
SIDE = 512
"""Pixels of their sides."""
PROTOCOL = "protocol"
"""The script that the others share."""
MISSING = re.compile(r"No module named '?([\w.]+)'?")
"""What Python says where an environment lacks a package."""


@dataclass(frozen=True)
class Script:
    """A script of the folder `scorers`."""

    name: str
    path: Path
    summary: str
    """Its first sentence."""
    install: str
    """How to install what it needs, in a line; empty where it does not say."""


def find_scripts(folder: Path) -> list[Script]:
    """The scripts of `folder` that score pictures, by name; none where there is no such folder."""
    found = []
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, ValueError, SyntaxError):
            continue
        text = ast.get_docstring(tree) or ""
        imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if PROTOCOL in imports:
            paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
            install = next((part for part in paragraphs if part.startswith("Install: ")), "")
            summary = paragraphs[0] if paragraphs else ""
            found.append(Script(path.stem, path, summary, install.removeprefix("Install: ")))
    return found


def find_scorer(name: str, known: Sequence[ScorerProcess], folder: Path, python: str) -> ScorerProcess:
    """The scorer `name` of `known`, or the script of that name or path, which `python` runs. Raises CdmError."""
    scripts = find_scripts(folder)
    for scorer in known:
        if scorer.name == name:
            return scorer
    path = next((script.path for script in scripts if script.name == name), Path(name))
    if path.suffix == ".py" and path.is_file():
        return ScorerProcess(name=path.stem.lower(), command=shlex.join([python, str(path)]))
    names = [*(scorer.name for scorer in known), *(script.name for script in scripts)]
    raise CdmError(f"{name}: neither a scorer of evaluate.scorers nor a script (known: {', '.join(names)})")


@dataclass(frozen=True)
class Checked:
    """What a scorer said of the two pictures."""

    answer: Answer
    seconds: float

    def __str__(self) -> str:
        """In a line."""
        figures = [f"{key} {_listed(values)}" for key, values in self.answer.scores.items()]
        figures += [f"{key} {_listed([value])} of both" for key, value in self.answer.summary.items()]
        return f"{'; '.join(figures)}; {self.seconds:.1f} s"


def check_scorer(
    scorer: ScorerProcess, prompts: Sequence[str], *, minutes: float, limit: str, scripts: Sequence[Script] = ()
) -> Checked:
    """What `scorer` answers of two pictures that are said to show `prompts`.

    Raises CdmError in one line: its program or script is not there, its environment lacks a package (with how to
    install it, where one of `scripts` says so), it fails, answers something else, or takes more than `minutes`, which
    `limit` sets.
    """
    command = Command.parse(scorer.command)
    if problem := scorer_problem(scorer.command):
        raise CdmError(f"scorer {scorer.name}: {problem}")
    begun = time.monotonic()
    try:
        answer = put(scorer, command, "check", draw_pictures(), prompts, minutes=minutes, limit=limit)
    except CdmError as error:
        package = MISSING.search(str(error))
        if package is None:
            raise CdmError(line(error)) from None
        names = {Path(word).stem for word in command.arguments}
        install = next((script.install for script in scripts if script.path.stem in names), "")
        remedy = f": {install}" if install else ": see docs/scorers.md"
        raise CdmError(
            f"scorer {scorer.name}: the environment of {command.program} lacks {package[1]}{remedy}"
        ) from None
    return Checked(answer, time.monotonic() - begun)


def draw_pictures() -> list[Tensor]:
    """A red circle on white, and a blue square on grey: uint8 (3, SIDE, SIDE) each."""
    place = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(place, place, indexing="ij")
    circle, square = x.square() + y.square() < 0.25, (x.abs() < 0.5) & (y.abs() < 0.5)
    return [_painted(circle, (200, 20, 20), (255, 255, 255)), _painted(square, (20, 40, 200), (150, 150, 150))]


def _painted(shape: Tensor, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Tensor:
    inside, outside = (torch.tensor(colour, dtype=torch.uint8)[:, None, None] for colour in (ink, paper))
    return torch.where(shape, inside, outside)


def _listed(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.6g}" for value in values)
