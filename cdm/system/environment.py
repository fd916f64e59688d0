"""What libraries read from the environment while they are loaded: to be set before torch is imported."""

from __future__ import annotations

import os
import sys

SETTINGS = {
    # OpenMP's threads wait for each other in a busy loop. Bounded, because two torch processes on the same cores can
    # otherwise become fifty times slower; one alone loses nothing.
    "GOMP_SPINCOUNT": "20000",
    # Advice of transformers that is not for the user of a command, such as how to install torchvision.
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables and their values; one that the user has set stays."""


def prepare_environment() -> None:
    """Sets the variables of this command and of what it starts, and has Python keep what it compiles.

    Where an image forbids Python to keep it, every stage would compile torch again, for seconds.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
