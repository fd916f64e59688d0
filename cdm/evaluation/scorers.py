"""Scorers that run as a process in an environment of their own: pictures and prompts go in, JSON comes out.

The command is started with two more arguments, a request to read and an answer to write:

request  {"format": "cdm-scorer-1", "set": "student/steps4",
          "images": [{"id": 0, "path": "/.../000000.png", "prompt": "..."}, ...]}
answer   {"scores": {"NAME": [a number for each image, in order], ...}, "summary": {"NAME": a number, ...}}

Either part of the answer may be missing. It ends with exit code 0 within a time limit; else the end of what it wrote
to standard error is shown. Answers are kept by what was asked (command, its files, pictures), so that a failure of one
scorer or set costs nothing of the others.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cdm.data.store import MANIFEST
from cdm.errors import CdmError
from cdm.evaluation.samples import SampleSet
from cdm.params import ScorerProcess
from cdm.system import programs
from cdm.system.commands import Command
from cdm.system.files import Memory, digest_of, read_json, sha256, write_json

FORMAT = "cdm-scorer-1"
LARGEST = 2**28
"""Bytes of an answer at most."""
LONGEST = 100
"""Characters of a name in it."""

_hashes = Memory()
"""Hashes of the files of commands, which are asked for with every sample set."""


@dataclass(frozen=True)
class Answer:
    """The answer of a scorer for one sample set."""

    scores: dict[str, list[float]]
    """Of each picture, by name."""
    summary: dict[str, float]


def ask(
    scorer: ScorerProcess, samples: SampleSet, prompts: Sequence[str], cache: Path, *, minutes: float
) -> Answer:
    """The answer of `scorer` on `samples`, whose pictures show `prompts` (one each), from `cache` if it is there.

    Raises CdmError if the command cannot be run, fails, takes longer than `minutes`, or answers with something else.
    """
    command = Command.parse(scorer.command)
    files = command.hashes(_hashes.sha256)
    pictures = sha256(samples.store.folder / MANIFEST)
    asked = digest_of([FORMAT, command.environment, command.arguments, files, list(prompts), pictures])
    kept = cache / f"{scorer.name}-{asked[:32]}.json"
    with suppress(CdmError):  # none is kept, or it is damaged
        return _parsed(read_json(kept), scorer, len(prompts))
    shown = (picture for batch in samples.batches() for picture in batch)
    name = f"{samples.model}/{samples.key}"
    answer = put(scorer, command, name, shown, prompts, minutes=minutes, limit="runtime.scorer_minutes")
    cache.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"scores": answer.scores, "summary": answer.summary})
    return answer


def put(
    scorer: ScorerProcess,
    command: Command,
    name: str,
    pictures: Iterable[Tensor],
    prompts: Sequence[str],
    *,
    minutes: float,
    limit: str,
) -> Answer:
    """The answer of `command`, which is `scorer`'s, on a set `name` of pictures, uint8 (3, height, width), that show
    `prompts`. `limit` is the setting that says how many `minutes` it may take.

    Raises CdmError if the command cannot be run, fails, takes longer, or answers with something else.
    """
    with tempfile.TemporaryDirectory(prefix="cdm-scorer-") as folder:
        request, reply = Path(folder) / "request.json", Path(folder) / "answer.json"
        images = _write_pictures(pictures, prompts, Path(folder))
        write_json(request, {"format": FORMAT, "set": name, "images": images})
        title = f"scorer {scorer.name}: {name}: {len(prompts)} pictures"
        programs.run(command, [str(request), str(reply)], title=title, minutes=minutes, limit=limit)
        answered = _read(reply, scorer)
    return _parsed(answered, scorer, len(prompts))


def _write_pictures(pictures: Iterable[Tensor], prompts: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for picture in pictures:
        path = folder / f"{len(rows):06d}.png"
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)
        rows.append({"id": len(rows), "path": str(path), "prompt": prompts[len(rows)]})
    return rows


def _read(path: Path, scorer: ScorerProcess) -> Any:
    try:
        if path.stat().st_size > LARGEST:
            raise CdmError(f"scorer {scorer.name}: {path.name} is longer than {LARGEST} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CdmError(f"scorer {scorer.name}: wrote no answer: {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CdmError(f"scorer {scorer.name}: {path.name} is not JSON: {error}") from None


def _parsed(answer: Any, scorer: ScorerProcess, count: int) -> Answer:
    parts = (answer.get("scores", {}), answer.get("summary", {})) if isinstance(answer, dict) else (None, None)
    match parts:
        case dict(scores), dict(summary) if scores or summary:
            pass
        case _:
            raise CdmError(f"scorer {scorer.name}: an answer has `scores` or `summary`, objects by name")
    odd = [name for name in (*scores, *summary) if not _is_name(name)]
    if odd:
        raise CdmError(f"scorer {scorer.name}: {odd[0][:LONGEST]!r} is no name of a figure")
    for name, values in scores.items():
        if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
            raise CdmError(
                f"scorer {scorer.name}: scores {name!r}: expected {count} finite numbers, one a picture"
            )
    for name, value in summary.items():
        if not _is_number(value):
            raise CdmError(
                f"scorer {scorer.name}: summary {name!r}: expected a finite number, not {str(value)[:LONGEST]!r}"
            )
    if scores.keys() & summary.keys():
        raise CdmError(
            f"scorer {scorer.name}: {min(scores.keys() & summary.keys())!r} is a score and a summary"
        )
    return Answer(
        {name: [float(value) for value in values] for name, values in scores.items()},
        {name: float(value) for name, value in summary.items()},
    )


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_name(name: str) -> bool:
    return name.isprintable() and 0 < len(name) <= LONGEST
