"""What libraries read from the environment while they are loaded: to be set before torch is imported."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

SETTINGS = {
    # OpenMP's threads wait for each other in a busy loop. Bounded, because two torch processes on the same cores can
    # otherwise become fifty times slower; one alone loses nothing.
    "GOMP_SPINCOUNT": "20000",
    # Advice of transformers that is not for the user of a command, such as how to install torchvision.
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables and their values; one that the user has set stays."""


NEEDED = ("diffusers", "psutil", "pydantic", "ruamel.yaml", "torch", "transformers", "typer")
"""Packages without which no stage can begin."""


def missing_packages() -> str | None:
    """A line where this Python lacks what the stages need, as where the environment has not been activated."""
    missing = [name for name in NEEDED if not _is_there(name)]
    if not missing:
        return None
    return (
        f"{sys.executable} has no {', '.join(missing)}: activate the environment first (source .venv/bin/activate),"
        " or make it (make install)"
    )


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def prepare_environment() -> None:
    """Sets the variables of this command and of what it starts, and has Python keep what it compiles.

    Where an image forbids Python to keep it, every stage would compile torch again, for seconds.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
