"""How the results of a report were made: when, where, at which commit, by which student and samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cdm.system.circumstances import Circumstances, some_of
from cdm.system.files import read_json

SHOWN = 9
"""Characters of a commit in a sentence."""
NAMED = 3
"""Changed files that are named; of the rest the number is told."""


@dataclass(frozen=True)
class Training:
    """A training's circumstances and time."""

    circumstances: Circumstances
    seconds: float


@dataclass(frozen=True)
class Making:
    """The circumstances of training and evaluation."""

    evaluated: Circumstances
    training: Training | None
    """None where it is not recorded."""
    hashes: Mapping[str, str]
    """Of student and samples, as in metrics/quality.json."""


def read_training(timing: Path) -> Training | None:
    """The record that a training has left in the file `timing`; None where there is none, or it is damaged."""
    record = read_json(timing)
    try:
        return Training(Circumstances(**record["circumstances"]), float(record["seconds"]))
    except (KeyError, TypeError, ValueError):
        return None


def sentence(making: Making) -> str:
    """When and at which commit, in a line."""
    parts = []
    if making.training is not None:
        parts.append(f"Trained {date(making.training.circumstances)} in {_duration(making.training.seconds)}")
    parts.append(f"{'evaluated' if parts else 'Evaluated'} {date(making.evaluated)}")
    if making.evaluated.commit is not None:
        parts.append(_commit(making.evaluated, SHOWN))
    return ", ".join(parts) + "."


def rows(making: Making) -> list[tuple[str, str]]:
    """All of it, as names and values."""
    if making.training is None:
        of_training = [("Training", "not recorded")]
    else:
        begun = making.training.circumstances
        of_training = [
            ("Training", f"begun {date(begun)}, took {_duration(making.training.seconds)}"),
            *_where("training", begun),
        ]
    return [
        *of_training,
        ("Evaluation", date(making.evaluated)),
        *_where("evaluation", making.evaluated),
        ("Student, SHA-256", making.hashes["student"]),
        ("Samples, SHA-256", making.hashes["samples"]),
    ]


def _where(what: str, found: Circumstances) -> list[tuple[str, str]]:
    commit = [] if found.commit is None else [(f"Code of the {what}", _commit(found))]
    return [(f"Machine of the {what}", f"{found.machine}; {found.versions}"), *commit]


def date(found: Circumstances) -> str:
    """The date to the minute, in UTC."""
    return datetime.fromisoformat(found.date).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(total: float) -> str:
    minutes, seconds = divmod(round(total), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _commit(found: Circumstances, digits: int | None = None) -> str:
    text = f"commit `{(found.commit or '')[:digits]}`"
    return f"{text} with changes in {some_of(found.changed, NAMED)}" if found.changed else text
