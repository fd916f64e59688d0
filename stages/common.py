"""Shared by all stages, around their one call into `cdm`: parameters, threads, places for results, errors as lines."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

import typer

from cdm.errors import CdmError
from cdm.params import Params, load
from cdm.preflight import check_run
from cdm.system import boundary, host, lock
from cdm.system.files import clear_removed, read_json
from cdm.system.launcher import is_launched, lost_others, rank, speaks_for_all
from cdm.system.places import check_file, check_folder
from stages import STARTED_BY_DVC, restore_results

PARAMS = Path("params.yaml")
REPOSITORY = Path(os.environ.get("DVC_ROOT", "."))
"""The repository that DVC was started in, also where it runs an experiment in a copy of it."""
CHECKPOINTS = REPOSITORY / "checkpoints"

FOLDERS = tuple(map(Path, ("data", "logs", "metrics", "models", "plots", "report")))
"""Where the stages write what DVC keeps."""

TeacherFile = Annotated[Path, typer.Option(help="What the stage `teacher` writes.")]
PromptsFolder = Annotated[Path, typer.Option(help="What the stage `prompts` wrote.")]
LatentsFolder = Annotated[Path, typer.Option(help="What the stage `latents` wrote.")]
StudentFolder = Annotated[Path, typer.Option(help="The student, a diffusers folder.")]


@contextmanager
def stage(*keys: str, files: Sequence[Path] = (), folders: Sequence[Path] = ()) -> Iterator[Params]:
    """The parameters of a stage that reads these of them, by dotted key; `runtime` is applied and free to change.

    `files` and `folders` are what it writes. Raises CdmError at once if the params file cannot be used, or if any stage
    would refuse it or could not write its results, so that a mistake of the last stage stops the first; and at the
    end if one of `keys` has changed since the start: DVC reads the parameters after a stage and would record the new
    ones for results of the old.
    """
    params = load(PARAMS)
    check_run(params)
    for folder in (*FOLDERS, CHECKPOINTS, *folders):
        check_folder(folder)
    for file in files:
        check_file(file)
    host.prepare(params.runtime.threads)
    if is_launched():
        from cdm.system.processes import join

        join(params.runtime.device, timedelta(hours=params.runtime.timeout_hours))
    before = _values(params, keys)
    yield params
    after = _values(load(PARAMS), keys)
    changed = [key for key in keys if before[key] != after[key]]
    if changed:
        raise CdmError(
            f"{PARAMS}: {', '.join(changed)} changed while the stage ran, so its results belong to the old values:"
            " run it again"
        )


def give_back_checkpoints(student: Path) -> None:
    """Deletes the checkpoints of the training that made a student, once it cannot be lost any more.

    They stay when a training is done: DVC has yet to copy the student into its cache, which takes minutes for a large
    one and fails on a full disk. What is not in the cache is deleted by DVC before it runs the training again. A stage
    that was started by hand deletes nothing, and of several processes only the first does.
    """
    first = os.environ.get("RANK", "0") == "0"
    if not first or STARTED_BY_DVC not in os.environ:
        return
    clear_removed(CHECKPOINTS)
    if not any(CHECKPOINTS.glob("distill-*")):
        return
    for record in student.glob("*.json"):
        made = read_json(record)
        try:
            folder, iterations = (
                CHECKPOINTS / Path(made["training"]).name,
                made["params"]["distill"]["iterations"],
            )
        except (KeyError, TypeError):  # another file, or a record of before this was kept
            continue
        if folder != CHECKPOINTS and isinstance(iterations, int) and is_committed(record):
            from cdm.training import checkpoint

            checkpoint.give_back(folder, iterations)


def is_committed(record: Path) -> bool:
    """Whether DVC's lock file and cache hold the folder of a student's record, with this very record in it."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            cache = Path(repo.cache.local.path)
    except DvcException:
        return False
    return lock.is_cached(record, cache)


def _values(params: Params, keys: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of dotted keys."""
    values = params.model_dump()
    return {key: reduce(getitem, key.split("."), values) for key in keys}


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command: its signature makes the options, what goes wrong is told in lines.

    Of several processes that were launched together the first to fail says it for all, with its rank. A stage of DVC's
    that comes to nothing leaves the results that Git has.
    """
    try:
        boundary.run(boundary.program(main), _tell)
    except SystemExit as end:
        if not end.code:
            atexit.unregister(restore_results)
        raise
    except Exception as error:
        if lost_others(error) or not speaks_for_all():
            sys.exit(1)
        if rank():
            print(f"error: {_of_rank()}unforeseen", file=sys.stderr)
        raise


def _tell(message: str) -> None:
    if speaks_for_all():
        boundary.tell(message, _of_rank())


def _of_rank() -> str:
    return f"rank {rank()}: " if rank() else ""
