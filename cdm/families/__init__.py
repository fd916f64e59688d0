"""The architectures that can be distilled; see `cdm.families.base` for what each provides."""

from __future__ import annotations

from cdm.errors import CdmError
from cdm.families.base import Conditioning, Family
from cdm.families.sd3 import StableDiffusion3

__all__ = ["Conditioning", "Family", "get_family"]

_FAMILIES: dict[str, Family] = {family.name: family for family in (StableDiffusion3(),)}


def get_family(name: str) -> Family:
    """The family `name`; raises CdmError with the known names."""
    if name not in _FAMILIES:
        raise CdmError(f"unknown family {name!r} (known: {', '.join(_FAMILIES)})")
    return _FAMILIES[name]
