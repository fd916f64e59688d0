"""The architectures that can be distilled; see `cdm.families.base` for what each provides.

A family is a module of this package with a `FAMILY`, imported when it is asked for by name: a run depends on its own
architecture and on no other. `docs/adding-a-family.md` shows how to write one.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from cdm.errors import CdmError

if TYPE_CHECKING:
    from cdm.families.base import Family
    from cdm.families.common import Conditioning

__all__ = ["Conditioning", "Family", "family_names", "family_of_pipeline", "get_family"]

_SHARED = ("base", "common", "configs", "folder", "tensor_form", "weights")
"""Modules of this package that are no family."""

if not TYPE_CHECKING:  # so that a type checker knows the two names that there are, and no others

    def __getattr__(name: str) -> Any:
        """`Conditioning` and `Family`, imported when they are asked for: with them comes torch, and what only names
        families, such as the check of a params file, does not wait for it."""
        if name in ("Conditioning", "Family"):
            return getattr(import_module(f"{__name__}.base"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def family_names() -> list[str]:
    """The known families, sorted; nothing is imported."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in _SHARED)


def check_name(name: str) -> str:
    """`name` if it is a family's; raises CdmError with the known names."""
    if name not in family_names():
        raise CdmError(f"unknown family {name!r} (known: {', '.join(family_names())})")
    return name


def get_family(name: str) -> Family:
    """The family `name`; raises CdmError with the known names."""
    family: Family = import_module(f"{__name__}.{check_name(name)}").FAMILY
    return family


def family_of_pipeline(class_name: str) -> Family:
    """The family that draws with a diffusers pipeline; raises CdmError if none does."""
    families = [get_family(name) for name in family_names()]
    for family in families:
        if family.pipeline_class_name == class_name:
            return family
    known = ", ".join(family.pipeline_class_name for family in families)
    raise CdmError(f"no family draws with a {class_name} (known: {known})")
