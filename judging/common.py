"""Shared by the stages of the judging: its params file and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdm.judging.design import Judging, load_judging
from cdm.judging.places import Places
from cdm.system import host

PARAMS = Path("judging/params.yaml")
PLACES = Places(Path("judging"))

Row = Annotated[str, typer.Argument(help="A model, one of `rows`.")]
SetName = Annotated[str, typer.Argument(metavar="SET", help="A prompt set, one of `sets`.")]


def read_params() -> Judging:
    """The judging of judging/params.yaml, its `runtime` applied. Raises CdmError."""
    judging = load_judging(PARAMS)
    host.prepare(judging.runtime.threads)
    return judging
