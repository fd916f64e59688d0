"""The architectures that can be distilled; see `cdm.families.base` for what each provides."""

from __future__ import annotations

from cdm.errors import CdmError
from cdm.families.base import Conditioning, Family
from cdm.families.sd3 import StableDiffusion3

__all__ = ["Conditioning", "Family", "family_of_pipeline", "get_family"]

_FAMILIES: dict[str, Family] = {family.name: family for family in (StableDiffusion3(),)}


def get_family(name: str) -> Family:
    """The family `name`; raises CdmError with the known names."""
    if name not in _FAMILIES:
        raise CdmError(f"unknown family {name!r} (known: {', '.join(_FAMILIES)})")
    return _FAMILIES[name]


def family_of_pipeline(class_name: str) -> Family:
    """The family that draws with a diffusers pipeline; raises CdmError if none does."""
    for family in _FAMILIES.values():
        if family.pipeline_class_name == class_name:
            return family
    known = ", ".join(family.pipeline_class_name for family in _FAMILIES.values())
    raise CdmError(f"no family draws with a {class_name} (known: {known})")
