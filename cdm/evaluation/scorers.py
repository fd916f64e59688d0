"""Scorers that run as a process in an environment of their own: pictures and prompts go in, JSON comes out.

The command is started with two more arguments, a request to read and an answer to write:

request  {"format": "cdm-scorer-1", "set": "student/steps4",
          "images": [{"id": 0, "path": "/.../000000.png", "prompt": "..."}, ...]}
answer   {"scores": {"NAME": [a number for each image, in order], ...}, "summary": {"NAME": a number, ...}}

Either part of the answer may be missing. It ends with exit code 0; with any other the end of what it wrote to
standard error is shown. Answers are kept by what was asked (command, its files, pictures), so that a failure of one
scorer or set costs nothing of the others.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cdm.data.store import MANIFEST
from cdm.errors import CdmError
from cdm.evaluation.samples import SampleSet
from cdm.params import ScorerProcess
from cdm.preflight import program_files
from cdm.system.files import digest_of, sha256, write_json

FORMAT = "cdm-scorer-1"
TAIL = 3
"""Last lines of a failed scorer's standard error that are shown."""


@dataclass(frozen=True)
class Answer:
    """The answer of a scorer for one sample set."""

    scores: dict[str, list[float]]
    """Of each picture, by name."""
    summary: dict[str, float]


def ask(scorer: ScorerProcess, samples: SampleSet, prompts: Sequence[str], cache: Path) -> Answer:
    """The answer of `scorer` on `samples`, whose pictures show `prompts` (one each), from `cache` if it is there.

    Raises CdmError if the command cannot be run, fails, or answers with something else.
    """
    program = {name: sha256(Path(name)) for name in program_files(scorer.command)}
    pictures = sha256(samples.store.folder / MANIFEST)
    asked = digest_of([FORMAT, scorer.command, program, list(prompts), pictures])
    kept = cache / f"{scorer.name}-{asked[:32]}.json"
    if kept.exists():
        return _parsed(_read(kept, scorer), scorer, len(prompts))
    with tempfile.TemporaryDirectory(prefix="cdm-scorer-") as folder:
        request, reply = Path(folder) / "request.json", Path(folder) / "answer.json"
        images = _write_pictures(samples, prompts, Path(folder))
        write_json(request, {"format": FORMAT, "set": f"{samples.model}/{samples.key}", "images": images})
        _run(scorer, request, reply)
        answered = _read(reply, scorer)
    answer = _parsed(answered, scorer, len(prompts))
    cache.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"scores": answer.scores, "summary": answer.summary})
    return answer


def _write_pictures(samples: SampleSet, prompts: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in samples.batches():
        for picture in batch:
            path = folder / f"{len(rows):06d}.png"
            Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)
            rows.append({"id": len(rows), "path": str(path), "prompt": prompts[len(rows)]})
    return rows


def _run(scorer: ScorerProcess, request: Path, reply: Path) -> None:
    """Runs the command; what it prints is passed on to standard error."""
    try:
        process = subprocess.Popen(
            [*shlex.split(scorer.command), str(request), str(reply)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise CdmError(f"scorer {scorer.name}: {scorer.command}: {error.strerror}") from None
    tail: deque[str] = deque(maxlen=TAIL)
    with process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            if line.strip():
                tail.append(" ".join(line.split()))
    if process.returncode:
        raise CdmError(
            f"scorer {scorer.name}: exit code {process.returncode}: {' | '.join(tail) or 'it said nothing'}"
        )


def _read(path: Path, scorer: ScorerProcess) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CdmError(f"scorer {scorer.name}: wrote no answer: {path.name} is missing") from None
    except ValueError as error:
        raise CdmError(f"scorer {scorer.name}: {path.name} is not JSON: {error}") from None


def _parsed(answer: Any, scorer: ScorerProcess, count: int) -> Answer:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    parts = (answer.get("scores", {}), answer.get("summary", {})) if isinstance(answer, dict) else (None, None)
    match parts:
        case dict(scores), dict(summary) if scores or summary:
            pass
        case _:
            raise CdmError(f"scorer {scorer.name}: an answer has `scores` or `summary`, objects by name")
    for name, values in scores.items():
        if not isinstance(values, list) or len(values) != count or not all(map(number, values)):
            raise CdmError(
                f"scorer {scorer.name}: scores {name!r}: expected {count} finite numbers, one a picture"
            )
    for name, value in summary.items():
        if not number(value):
            raise CdmError(f"scorer {scorer.name}: summary {name!r}: expected a finite number, not {value!r}")
    if scores.keys() & summary.keys():
        raise CdmError(
            f"scorer {scorer.name}: {min(scores.keys() & summary.keys())!r} is a score and a summary"
        )
    return Answer(
        {name: [float(value) for value in values] for name, values in scores.items()},
        {name: float(value) for name, value in summary.items()},
    )
