"""What every stage does around its one call into `cdm`: parameters, threads, errors as messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cdm.errors import CdmError
from cdm.params import Params, load
from cdm.preflight import check_paths
from cdm.system import host

PARAMS = Path("params.yaml")

TeacherFile = Annotated[Path, typer.Option(help="What the stage `teacher` wrote.")]
PromptsFolder = Annotated[Path, typer.Option(help="What the stage `prompts` wrote.")]
LatentsFolder = Annotated[Path, typer.Option(help="What the stage `latents` wrote.")]
StudentFolder = Annotated[Path, typer.Option(help="The student, a diffusers folder.")]


@contextmanager
def stage(*sections: str) -> Iterator[Params]:
    """The parameters of a stage that reads `sections` of them; `runtime` is applied and free to change.

    Raises CdmError at once if the params file cannot be used or names files that are not there, so that a bad
    path of the last stage stops the first; and at the end if one of the sections has changed since the start:
    DVC reads the parameters after a stage and would record the new ones for results of the old.
    """
    params = load(PARAMS)
    check_paths(params)
    host.prepare(params.runtime)
    before = _values(params, sections)
    yield params
    after = _values(load(PARAMS), sections)
    changed = [name for name in sections if before[name] != after[name]]
    if changed:
        raise CdmError(
            f"{PARAMS}: {', '.join(changed)} changed while the stage ran, so its results belong to the old values:"
            " run it again"
        )


def _values(params: Params, sections: tuple[str, ...]) -> dict[str, Any]:
    return params.model_dump(include=set(sections))


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command: its signature makes the options, a CdmError a message and exit code 1.

    Of several processes on a machine the first says it for all.
    """
    try:
        typer.run(main)
    except CdmError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
