"""Distillation of text-to-image diffusion models into few-step students, by continuous-time distribution matching.

The library behind the pipeline, usable without it:

    import cdm

    params = cdm.load_params("params.yaml", {"schedule.max_len": 6})
    training = cdm.Distillation(params, "runs/first")
    for figures in training:
        print(training.iteration, figures["loss_fake"])

`docs/library.md` goes on from here. Importing this package imports neither torch nor diffusers; asking for a name of
its interface does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm.errors import CdmError
    from cdm.handover.drawing import draw_pictures
    from cdm.params import Params
    from cdm.params import load as load_params
    from cdm.training.session import Distillation

__all__ = ["CdmError", "Distillation", "Params", "draw_pictures", "load_params"]

_INTERFACE = {
    "CdmError": ("cdm.errors", "CdmError"),
    "Distillation": ("cdm.training.session", "Distillation"),
    "Params": ("cdm.params", "Params"),
    "draw_pictures": ("cdm.handover.drawing", "draw_pictures"),
    "load_params": ("cdm.params", "load"),
}
"""Module and name there of everything in the interface."""


def __getattr__(name: str) -> Any:
    """A name of the interface, imported when it is asked for."""
    if name not in _INTERFACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _INTERFACE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
