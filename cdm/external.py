"""Hashes of a pipeline's external inputs, which no stage makes: the teacher, prompt lists, judge, real pictures, models
of metrics, programs of scorers.

The params file names each of them once. The stage `teacher` writes their hashes into small files that DVC watches, so
that a change behind a name reruns the stages that read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdm.data.prompt_formats import text_files
from cdm.errors import CdmError
from cdm.measures import chosen
from cdm.models.manifest import TeacherManifest, describe
from cdm.models.metric_models import model_path, scorer_problem
from cdm.models.published import expected_hashes
from cdm.models.use import Use
from cdm.params import Evaluate, Prompts, ScorerProcess, Teacher
from cdm.system.commands import Command
from cdm.system.files import Memory, write_json

Hashes = dict[str, str]
"""SHA-256 by the path in a folder."""


def record_teacher(settings: Teacher, out: Path, memory: Memory, use: Use | None = None) -> TeacherManifest:
    """Write which model `settings` name to `out`, checked for what is asked of it: see
    `cdm.models.manifest.describe`. Raises CdmError."""
    try:
        recorded = TeacherManifest.read(out)
    except CdmError:
        recorded = None
    teacher = describe(
        settings.family, settings.source, settings.revision, settings.resolution, recorded, memory, use
    )
    teacher.write(out)
    return teacher


def record_prompts(settings: Prompts, out: Path, memory: Memory) -> None:
    """Write the hashes of the prompt lists to `out`, by their names. Raises CdmError."""
    names = sorted({*settings.train, *settings.eval})
    _write(out, {name: _prompts(Path(name), memory) for name in names})


def record_evaluation(settings: Evaluate, out: Path, memory: Memory) -> None:
    """Write the hashes of what an evaluation reads to `out`: judge, real pictures, models of the chosen metrics, and
    files of the scorers' commands. Raises CdmError."""
    keys = {key for measure in chosen(settings.metrics) for key in measure.models}
    models = {key: getattr(settings.models, key) for key in sorted(keys)}
    found = {
        "judge": settings.judge and _hashes(Path(settings.judge), memory),
        "real": settings.real and _hashes(Path(settings.real), memory),
        "models": {key: _model(key, source, memory) for key, source in models.items()},
        "scorers": {each.name: _program(each, memory) for each in settings.scorers},
    }
    _write(out, found)


def _model(key: str, source: str | None, memory: Memory) -> str | Hashes | None:
    """The hashes of a model that measures. Raises CdmError for a file that is another than the one that was fetched."""
    path = model_path(key, source)
    found = _hashes(path, memory)
    if path is None or found is None:
        return None
    by_name = found if isinstance(found, dict) else {path.name: found}
    for name, expected in expected_hashes(key, source, path).items():
        if by_name.get(name, expected) != expected:
            raise CdmError(
                f"evaluate.models.{key}: {path / name if path.is_dir() else path}: another file than the one that is"
                " published or was fetched: `cdm fetch` says what to do"
            )
    return found


def _program(scorer: ScorerProcess, memory: Memory) -> Hashes | None:
    if scorer_problem(scorer.command):  # it may be skipped, and come later
        return None
    return Command.parse(scorer.command).hashes(memory.sha256)


def _prompts(path: Path, memory: Memory) -> str | Hashes:
    """The hash of a list, or of every text in a folder of prompts."""
    if path.is_dir():
        return {text.name: memory.sha256(text) for text in text_files(path)}
    return memory.sha256(path)


def _hashes(path: Path | None, memory: Memory) -> str | Hashes | None:
    """The hash of a file, or of every file in a folder."""
    if path is None:
        return None
    return memory.folder(path) if path.is_dir() else memory.sha256(path)


def _write(out: Path, value: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, value)
