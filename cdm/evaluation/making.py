"""How the results of a report were made: when, where, at which commit, by which student and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cdm.system.circumstances import Circumstances
from cdm.system.files import read_json

SHOWN = 9
"""Characters of a commit in a sentence."""
NAMED = 3
"""Changed files that are named; of the rest the number is told."""

Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Training:
    """A training's circumstances and time. One that was resumed is timed from `resumed_at` on."""

    circumstances: Circumstances
    seconds: float
    resumed_at: int


@dataclass(frozen=True)
class Making:
    """The circumstances of training and evaluation."""

    evaluated: Circumstances
    training: Training | None
    """None where the student came from DVC's cache or from elsewhere, and is not that of the last training here."""
    hashes: Mapping[str, str]
    """As in metrics/quality.json."""


def read_training(timing: Path, log: Curves) -> Training | None:
    """The record of a training in the file `timing`, if it is that of the training with the log `log`.

    The record has the newest row of its log: losses in full precision are those of one training. DVC takes a student
    and its log from the cache, but knows nothing of this file.
    """
    record = read_json(timing)
    try:
        newest = {name: float(value) for name, value in record["last_row"].items() if name != "iteration"}
        iteration = record["last_row"]["iteration"]
        there = {name: points[-1][1] for name, points in log.items() if points and points[-1][0] == iteration}
        if newest != there:
            return None
        return Training(
            Circumstances(**record["circumstances"]), float(record["seconds"]), int(record["resumed_at"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def sentence(making: Making) -> str:
    """When and at which commit, in a line."""
    parts = []
    if making.training is not None:
        parts.append(f"Trained {date(making.training.circumstances)} in {_duration(making.training)}")
    parts.append(f"{'evaluated' if parts else 'Evaluated'} {date(making.evaluated)}")
    if making.evaluated.commit is not None:
        parts.append(_commit(making.evaluated, SHOWN))
    return ", ".join(parts) + "."


def rows(making: Making) -> list[tuple[str, str]]:
    """All of it, as names and values."""
    if making.training is None:
        of_training = [("Training", "not recorded here: the student came from DVC's cache, or from elsewhere")]
    else:
        begun = making.training.circumstances
        of_training = [
            ("Training", f"begun {date(begun)}, took {_duration(making.training)}"),
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


def _duration(training: Training) -> str:
    minutes, seconds = divmod(round(training.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return text + (f" from iteration {training.resumed_at} on" if training.resumed_at else "")


def _commit(found: Circumstances, digits: int | None = None) -> str:
    text = f"commit `{(found.commit or '')[:digits]}`"
    if not found.changed:
        return text
    named = [f"`{name}`" for name in found.changed[:NAMED]]
    more = len(found.changed) - NAMED
    return f"{text} with changes in {', '.join([*named, *([f'{more} more'] if more > 0 else [])])}"
