"""What a params file asks of a teacher, beyond being whole: pictures that it draws, texts that it reads, layers that
it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdm.errors import CdmError

if TYPE_CHECKING:
    from cdm.families import Family
    from cdm.families.configs import Configs


@dataclass(frozen=True)
class Use:
    """What is asked of a teacher, beside its resolution. None: nothing, or the model's own."""

    max_sequence_length: int | None = None
    """Text tokens, `prompts.max_sequence_length`."""
    pictures: tuple[int, int] | None = None
    """Height and width, in pixels, of the real pictures that samples will be compared with."""
    targets: Sequence[str] | None = None
    """Layers that a LoRA adapts, where `distill.lora.targets` lists them."""


def check_use(family: Family, source: Configs, resolution: int | None, use: Use) -> None:
    """Raises CdmError where the model whose configs are in `source` does not draw `resolution` (pixels), or does not
    draw, read or have what else is asked of it."""
    shape = family.latent_shape(source, resolution)
    family.conditioning_shapes(source, use.max_sequence_length)
    pixels = family.pixels_per_latent(source)
    drawn = shape[-2] * pixels, shape[-1] * pixels
    if use.pictures is not None and use.pictures != drawn:
        raise CdmError(
            f"evaluate.real: its pictures have {_size(use.pictures)} pixels, but the teacher draws {_size(drawn)}:"
            " resize them, or set evaluate.real to null to compare with the teacher's samples"
        )
    if use.targets is not None:
        import torch

        with torch.device("meta"):
            family.adapted_layers(family.build_transformer(source), use.targets)


def _size(pixels: tuple[int, int]) -> str:
    return f"{pixels[0]} x {pixels[1]}"
