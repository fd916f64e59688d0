"""Checks, before a run starts, that what a params file names exists: files and folders, models of measures,
packages, and programs that score pictures. This needs no torch. A result depends on nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cdm.errors import CdmError
from cdm.models.hub import is_hub_id
from cdm.models.metric_models import missing_models
from cdm.params import Distill, Evaluate, Params, Runtime
from cdm.system.commands import Command


def check_paths(settings: Params) -> None:
    """Raises CdmError with a line for every file, folder or package that is named and that is not there."""
    problems = list(_problems(settings))
    if problems:
        raise CdmError("\n".join(problems))


def _problems(settings: Params) -> Iterator[str]:
    teacher, evaluate, configs = settings.teacher, settings.evaluate, settings.runtime.accelerate_config
    if not Path(teacher.source).is_dir() and not is_hub_id(teacher.source):
        yield f"teacher.source: {teacher.source}: no such folder, and not a hub id (org/name)"
    for key in ("train", "eval"):
        for name in getattr(settings.prompts, key):
            if not Path(name).exists():
                yield f"prompts.{key}: {name}: no such file"
    if evaluate.judge is not None and not Path(evaluate.judge).is_dir():
        yield f"evaluate.judge: {evaluate.judge}: no such folder"
    if evaluate.real is not None and not Path(evaluate.real).is_file():
        yield f"evaluate.real: {evaluate.real}: no such file"
    yield from missing_models(evaluate)
    yield from _missing_scorers(evaluate)
    if configs is not None and not Path(configs).is_file():
        yield f"runtime.accelerate_config: {configs}: no such file"
    yield from _missing_packages(settings.distill, settings.runtime)


def _missing_packages(distill: Distill, runtime: Runtime) -> Iterator[str]:
    for role in ("student", "fake"):
        if getattr(distill, role).states == "8bit" and find_spec("bitsandbytes") is None:
            yield f"distill.{role}.states: 8bit needs bitsandbytes: pip install bitsandbytes, or set it to fp32"
    base = distill.lora.base if distill.lora is not None else "precision"
    if base != "precision" and find_spec("bitsandbytes") is None:
        yield f"distill.lora.base: {base} needs bitsandbytes: pip install bitsandbytes, or set it to precision"
    tracker = runtime.tracker
    if tracker is not None and find_spec(tracker) is None:
        yield f"runtime.tracker: {tracker} is not installed: pip install {tracker}, or set it to null"


def _missing_scorers(evaluate: Evaluate) -> Iterator[str]:
    """A line for each scorer whose program, or whose script, is not there."""
    for scorer in evaluate.scorers:
        try:
            command = Command.parse(scorer.command)
        except CdmError as error:
            yield f"evaluate.scorers: {scorer.name}: {error}"
            continue
        if command.program is None:
            program = command.arguments[0]
            yield f"evaluate.scorers: {scorer.name}: {program}: no such program: see docs/evaluation.md"
        for name in command.missing_scripts():
            yield f"evaluate.scorers: {scorer.name}: {name}: no such file"
