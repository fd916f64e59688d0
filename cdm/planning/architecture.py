"""The transformer of a teacher without its weights, from the configs of a folder or known by its hub id, at one
resolution and length of text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import Family, get_family
from cdm.families.common import MASK
from cdm.families.configs import TRANSFORMER, Configs
from cdm.families.folder import parts
from cdm.models.hub import is_hub_id
from cdm.params import Lora, Teacher
from cdm.training.networks import adapter_config

FLOAT32 = 4
ENCODED = {"fp32": 4, "bf16": 2}
"""Bytes of a number in `prompts.precision`."""


@dataclass(frozen=True)
class Architecture:
    """A transformer as a run trains it. What it builds is on the device of the context, `torch.device("meta")` or fake
    tensors, which have shapes and no values."""

    name: str
    """The name in tables: the model and its size of picture."""
    family: Family
    configs: Configs
    latent_shape: tuple[int, ...]
    """Of one sample: (channels, height, width)."""
    text_shapes: dict[str, tuple[int, ...]]
    """Of one prompt's conditioning, by the names in it."""
    shift: float
    """The timestep shift of the scheduler."""
    encoder_parameters: int
    """Of all text encoders."""
    learning: Literal["all", "none"] | Lora = "all"
    """Which parameters are trained: all, none, or those of a LoRA adapter."""

    def frozen(self) -> Architecture:
        """The architecture as a teacher: no parameter is trained."""
        return replace(self, learning="none")

    def adapted(self, lora: Lora) -> Architecture:
        """The architecture with frozen weights and a LoRA adapter that is trained."""
        return replace(self, learning=lora)

    def build(self) -> nn.Module:
        """The transformer, in evaluation mode."""
        model = self.family.build_transformer(self.configs)
        if self.learning != "all":
            model.requires_grad_(False)
        if isinstance(self.learning, Lora):
            model.add_adapter(adapter_config(self.family, model, self.learning))  # type: ignore[operator]
        return model

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Latents `x`, levels `sigma` and the conditioning of `batch` samples. There is no mask: all tokens count as
        real, which is the longest text, and no shape depends on values."""
        return {
            "x": torch.empty(batch, *self.latent_shape),
            "sigma": torch.empty(batch),
            **{name: torch.empty(batch, *shape) for name, shape in self.text_shapes.items() if name != MASK},
        }

    def velocity(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The velocity of `inputs` by a `model` that `build` made."""
        conditioning = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
        return self.family.velocity(model, inputs["x"], inputs["sigma"], conditioning)

    def conditioning_bytes(self, number: int = FLOAT32) -> int:
        """Bytes of one prompt's conditioning, with `number` bytes for a number and one for an entry of a mask."""
        return sum((1 if name == MASK else number) * prod(shape) for name, shape in self.text_shapes.items())

    def sample_bytes(self) -> int:
        """Bytes of what one sample gives the transformer: latents, a level and the conditioning, in float32."""
        return FLOAT32 * (prod(self.latent_shape) + 1) + self.conditioning_bytes()


def find(teacher: Teacher, max_sequence_length: int | None) -> Architecture:
    """The architecture of `teacher`: from its folder, from the hub's cache, or known by its id.

    Nothing is fetched. Raises CdmError where it is none of these.
    """
    family, folder = get_family(teacher.family), Path(teacher.source)
    if not folder.is_dir():
        cached = _in_cache(teacher) if is_hub_id(teacher.source) else None
        if cached is None:
            return published(family, teacher.source, max_sequence_length, teacher.resolution)
        folder = cached
    encoders = count_encoder_parameters(folder)
    return _architecture(teacher.source, family, folder, encoders, max_sequence_length, teacher.resolution)


def published(
    family: Family, source: str, max_sequence_length: int | None = None, resolution: int | None = None
) -> Architecture:
    """The architecture of a published model, of which no file need be here. CdmError if `family` does not know it."""
    if source not in family.published:
        raise CdmError(
            f"teacher.source: {source} is not on this disk, and not known without it (of the family {family.name},"
            f" {', '.join(family.published)} {'is' if len(family.published) == 1 else 'are'}):"
            " run the stage `teacher` first, which fetches it"
        )
    model = family.published[source]
    return _architecture(
        source, family, model.configs, model.encoder_parameters, max_sequence_length, resolution
    )


def _architecture(
    source: str,
    family: Family,
    configs: Configs,
    encoder_parameters: int,
    max_sequence_length: int | None,
    resolution: int | None,
) -> Architecture:
    shape = family.latent_shape(configs, resolution)
    height, width = (size * family.pixels_per_latent(configs) for size in shape[-2:])
    return Architecture(
        name=f"{source}, {height} x {width}",
        family=family,
        configs=configs,
        latent_shape=shape,
        text_shapes=family.conditioning_shapes(configs, max_sequence_length),
        shift=family.shift(configs, resolution),
        encoder_parameters=encoder_parameters,
    )


def _in_cache(teacher: Teacher) -> Path | None:
    """The hub cache's folder of the model, if its config is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(teacher.source, TRANSFORMER, revision=teacher.revision)
    return Path(found).parent.parent if isinstance(found, str) else None


def count_encoder_parameters(folder: Path) -> int:
    """Parameters of the text encoders that a pipeline's index names, from their configs."""
    import transformers

    total = 0
    for name, (library, kind) in parts(folder).items():
        if name.startswith("text_encoder") and library == "transformers":
            model = getattr(transformers, kind)
            with torch.device("meta"):
                encoder = model(model.config_class.from_pretrained(folder / name))
            total += sum(parameter.numel() for parameter in encoder.parameters())
    return total
