"""What a params file names outside itself: all of it is looked for before anything long starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cdm.errors import CdmError
from cdm.params import Params


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` on a hub; where `org` is a folder here, one inside it was meant."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def check_paths(named: Params) -> None:
    """Raises CdmError with a line for every file, folder or package that is named and that is not there."""
    problems = list(_problems(named))
    if problems:
        raise CdmError("\n".join(problems))


def _problems(named: Params) -> Iterator[str]:
    teacher, evaluate, configs = named.teacher, named.evaluate, named.runtime.accelerate_config
    if not Path(teacher.source).expanduser().is_dir() and not is_hub_id(teacher.source):
        yield f"teacher.source: {teacher.source}: no such folder, and not a hub id (org/name)"
    for key in ("train", "eval"):
        for name in getattr(named.prompts, key):
            if not Path(name).is_file():
                yield f"prompts.{key}: {name}: no such file"
    if evaluate.judge is not None and not Path(evaluate.judge).is_dir():
        yield f"evaluate.judge: {evaluate.judge}: no such folder"
    if evaluate.real is not None and not Path(evaluate.real).is_file():
        yield f"evaluate.real: {evaluate.real}: no such file"
    if configs is not None and not Path(configs).is_file():
        yield f"runtime.accelerate_config: {configs}: no such file"
    tracker = named.runtime.tracker
    if tracker is not None and find_spec(tracker) is None:
        yield f"runtime.tracker: {tracker} is not installed: pip install {tracker}, or set it to null"
