"""What a params file asks of a teacher, beyond being whole: sizes that it draws, and lengths of text that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdm.errors import CdmError

if TYPE_CHECKING:
    from cdm.families import Family
    from cdm.families.configs import Configs


@dataclass(frozen=True)
class Use:
    """What is asked of a teacher. None: nothing, or for the first two the model's own."""

    resolution: int | None = None
    """Pixels, `teacher.resolution`."""
    max_sequence_length: int | None = None
    """Text tokens, `prompts.max_sequence_length`."""
    pictures: tuple[int, int] | None = None
    """Height and width, in pixels, of the real pictures that samples will be compared with."""


def check_use(family: Family, source: Configs, use: Use) -> None:
    """Raises CdmError where the model whose configs are in `source` does not draw or read what is asked of it."""
    shape = family.latent_shape(source, use.resolution)
    family.conditioning_shapes(source, use.max_sequence_length)
    pixels = family.pixels_per_latent(source)
    drawn = shape[-2] * pixels, shape[-1] * pixels
    if use.pictures is not None and use.pictures != drawn:
        raise CdmError(
            f"evaluate.real: its pictures have {_size(use.pictures)} pixels, but the teacher draws {_size(drawn)}:"
            " resize them, or set evaluate.real to null to compare with the teacher's samples"
        )


def _size(pixels: tuple[int, int]) -> str:
    return f"{pixels[0]} x {pixels[1]}"
