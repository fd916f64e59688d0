"""Shared by all stages, around their one call into `cdm`: parameters, threads, errors as messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm.errors import CdmError
from cdm.params import Params, load
from cdm.preflight import check_paths
from cdm.system import host
from cdm.system.files import arguments_at_home

if TYPE_CHECKING:
    from cdm.models.student import Origin

PARAMS = Path("params.yaml")
REPOSITORY = Path(os.environ.get("DVC_ROOT", "."))
"""The repository that DVC was started in, also where it runs an experiment in a copy of it."""
CHECKPOINTS = REPOSITORY / "checkpoints"

STARTED_BY_DVC = "DVC_STAGE"
"""Variable of the environment in which DVC names the stage that it runs."""

TeacherFile = Annotated[Path, typer.Option(help="What the stage `teacher` writes.")]
PromptsFolder = Annotated[Path, typer.Option(help="What the stage `prompts` wrote.")]
LatentsFolder = Annotated[Path, typer.Option(help="What the stage `latents` wrote.")]
StudentFolder = Annotated[Path, typer.Option(help="The student, a diffusers folder.")]


@contextmanager
def stage(*keys: str) -> Iterator[Params]:
    """The parameters of a stage that reads these of them, by dotted key; `runtime` is applied and free to change.

    Raises CdmError at once if the params file cannot be used or names files that are not there, so that a bad
    path of the last stage stops the first; and at the end if one of `keys` has changed since the start: DVC reads
    the parameters after a stage and would record the new ones for results of the old.
    """
    params = load(PARAMS)
    check_paths(params)
    host.prepare(params.runtime.threads)
    before = _values(params, keys)
    yield params
    after = _values(load(PARAMS), keys)
    changed = [key for key in keys if before[key] != after[key]]
    if changed:
        raise CdmError(
            f"{PARAMS}: {', '.join(changed)} changed while the stage ran, so its results belong to the old values:"
            " run it again"
        )


def give_back_checkpoints(origin: Origin | None) -> None:
    """Deletes the checkpoints of the training that made a student, once it cannot be lost any more.

    They stay when a training is done: DVC has yet to copy the student into its cache, which takes minutes for a large
    one and fails on a full disk. When DVC starts a stage that reads the student, it has done so. A stage that was
    started by hand cannot know, and deletes nothing.
    """
    from cdm.training import checkpoint

    first = os.environ.get("RANK", "0") == "0"
    if origin is not None and origin.training and first and STARTED_BY_DVC in os.environ:
        checkpoint.give_back(CHECKPOINTS / origin.training, origin.params["distill"]["iterations"])


def _values(params: Params, keys: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of dotted keys."""
    values = params.model_dump()
    return {key: reduce(getitem, key.split("."), values) for key in keys}


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command: its signature makes the options, a CdmError a message and exit code 1.

    Of several processes on a machine the first says it for all.
    """
    sys.argv[1:] = arguments_at_home(sys.argv[1:])
    try:
        typer.run(main)
    except CdmError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
