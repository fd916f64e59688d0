"""Architectures without weights: built from a folder's configs, or known by their hub id.

A model and its inputs are built on the device of the context: `torch.device("meta")`, or fake tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.models.hub import is_hub_id
from cdm.params import Lora, Teacher


@dataclass(frozen=True)
class Architecture:
    """A transformer at its training resolution."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    """Arguments of the transformer for a batch."""
    conditioning: tuple[str, ...]
    """Names of the inputs that a prompt becomes."""
    shift: float
    """The timestep shift of the scheduler."""
    encoder_parameters: int
    """Of all text encoders."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that LoRA adapts."""

    def frozen(self) -> Architecture:
        """The architecture as a teacher: nothing learns."""
        return replace(self, build=lambda: self.build().requires_grad_(False))

    def adapted(self, lora: Lora) -> Architecture:
        """The frozen architecture with an adapter, which learns."""

        def build() -> nn.Module:
            from peft import LoraConfig

            model = self.build().requires_grad_(False)
            config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(self.lora_targets))
            model.add_adapter(config)  # type: ignore[operator]
            return model

        return replace(self, build=build)

    @staticmethod
    def velocity(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """What the model says of `inputs`."""
        velocity: Tensor = model(**inputs, return_dict=False)[0]
        return velocity

    def parameters(self) -> int:
        """Number of the transformer's parameters."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def conditioning_bytes(self) -> int:
        """Bytes of one prompt's conditioning, float32 as it is stored."""
        with torch.device("meta"):
            inputs = self.inputs(1)
        return sum(inputs[name].nbytes for name in self.conditioning)


def sd3(
    name: str, config: dict[str, Any], *, size: int, text_tokens: int, shift: float, encoder_parameters: int
) -> Architecture:
    """An SD3 transformer of a diffusers `config`, on latents of `size` on a side and `text_tokens` tokens of all
    encoders together."""

    def build() -> nn.Module:
        from diffusers import SD3Transformer2DModel

        model: nn.Module = SD3Transformer2DModel(**config)
        return model

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.empty(batch, config["in_channels"], size, size),
            "encoder_hidden_states": torch.empty(batch, text_tokens, config["joint_attention_dim"]),
            "pooled_projections": torch.empty(batch, config["pooled_projection_dim"]),
            "timestep": torch.empty(batch),
        }

    names = ("encoder_hidden_states", "pooled_projections")
    targets = tuple(get_family("sd3").lora_targets)
    return Architecture(name, build, inputs, names, shift, encoder_parameters, targets)


def sd3_medium(max_sequence_length: int = 256, resolution: int = 1024) -> Architecture:
    """SD3-Medium: at 1024 x 1024, 4,096 image tokens; 77 + `max_sequence_length` text tokens."""
    config = {
        "sample_size": 128,
        "in_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    encoders = 123_650_304 + 694_659_840 + 4_762_310_656  # CLIP-L, OpenCLIP-bigG, T5-XXL
    return sd3(
        f"SD3-Medium, {resolution} x {resolution}",
        config,
        size=resolution // 8,
        text_tokens=77 + max_sequence_length,
        shift=3.0,
        encoder_parameters=encoders,
    )


def packed(
    family: str,
    name: str,
    config: dict[str, Any],
    *,
    size: int,
    text_tokens: int,
    shift: float,
    encoder_parameters: int,
) -> Architecture:
    """A transformer of packed latents, LongCat-Image's or FLUX.1's, of a diffusers `config`, on latents of `size` on a
    side and `text_tokens` tokens."""
    image_tokens = (size // 2) ** 2
    pooled = family == "flux"

    def build() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, _PACKED[family])(**config)
        return model

    def inputs(batch: int) -> dict[str, Tensor]:
        found = {
            "hidden_states": torch.empty(batch, image_tokens, config["in_channels"]),
            "encoder_hidden_states": torch.empty(batch, text_tokens, config["joint_attention_dim"]),
            "timestep": torch.empty(batch),
            "img_ids": torch.empty(image_tokens, 3),
            "txt_ids": torch.empty(text_tokens, 3),
        }
        if pooled:
            found["pooled_projections"] = torch.empty(batch, config["pooled_projection_dim"])
        if config.get("guidance_embeds"):
            found["guidance"] = torch.empty(batch)
        return found

    names = ("encoder_hidden_states", "pooled_projections") if pooled else ("encoder_hidden_states",)
    targets = tuple(get_family(family).lora_targets)
    return Architecture(name, build, inputs, names, shift, encoder_parameters, targets)


def longcat_image(max_sequence_length: int = 512, resolution: int = 1024) -> Architecture:
    """LongCat-Image: at 1024 x 1024, 4,096 image tokens."""
    return packed(
        "longcat",
        f"LongCat-Image, {resolution} x {resolution}",
        {"in_channels": 64, "joint_attention_dim": 3584},
        size=resolution // 8,
        text_tokens=max_sequence_length,
        shift=_published_shift(resolution),
        encoder_parameters=8_292_166_656,  # Qwen2.5-VL-7B
    )


def flux_dev(max_sequence_length: int = 512, resolution: int = 1024) -> Architecture:
    """FLUX.1-dev: at 1024 x 1024, 4,096 image tokens."""
    return packed(
        "flux",
        f"FLUX.1-dev, {resolution} x {resolution}",
        {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
        size=resolution // 8,
        text_tokens=max_sequence_length,
        shift=_published_shift(resolution),
        encoder_parameters=123_060_480 + 4_762_310_656,  # CLIP-L without its projection, T5-XXL
    )


def _published_shift(resolution: int) -> float:
    """The dynamic shift of the schedulers that LongCat-Image and FLUX.1-dev come with."""
    tokens = (resolution // 16) ** 2
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def find(teacher: Teacher, max_sequence_length: int) -> Architecture:
    """The architecture of `teacher`: from its folder, from the hub's cache, or known by its id.

    Nothing is fetched. Raises CdmError where it is none of these.
    """
    folder = Path(teacher.source).expanduser()
    if not folder.is_dir():
        cached = _in_cache(teacher) if is_hub_id(teacher.source) else None
        if cached is None:
            return _known(teacher, max_sequence_length)
        folder = cached
    if teacher.family not in _FROM_FOLDER:
        raise CdmError(
            f"teacher.family: {teacher.family} cannot be planned (only {', '.join(_FROM_FOLDER)} can)"
        )
    return _FROM_FOLDER[teacher.family](folder, teacher, max_sequence_length)


def _known(teacher: Teacher, max_sequence_length: int) -> Architecture:
    if (teacher.family, teacher.source) in _KNOWN:
        return _KNOWN[teacher.family, teacher.source](max_sequence_length, teacher.resolution or 1024)
    known = ", ".join(source for _, source in _KNOWN)
    raise CdmError(
        f"teacher.source: {teacher.source} is not on this disk, and not known without it ({known}):"
        " run the stage `teacher` first, which fetches it"
    )


def _in_cache(teacher: Teacher) -> Path | None:
    """The hub cache's folder of the model, if its config is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(teacher.source, "transformer/config.json", revision=teacher.revision)
    return Path(found).parent.parent if isinstance(found, str) else None


def _sd3_from_folder(folder: Path, teacher: Teacher, max_sequence_length: int) -> Architecture:
    family = get_family("sd3")
    tokens = _json(folder / "tokenizer/tokenizer_config.json")["model_max_length"]
    return sd3(
        teacher.source,
        _transformer_config(folder),
        size=family.latent_shape(folder, teacher.resolution)[-1],
        text_tokens=tokens + max_sequence_length,
        shift=family.shift(folder, teacher.resolution),
        encoder_parameters=_encoder_parameters(folder),
    )


def _packed_from_folder(folder: Path, teacher: Teacher, max_sequence_length: int) -> Architecture:
    family = get_family(teacher.family)
    return packed(
        teacher.family,
        teacher.source,
        _transformer_config(folder),
        size=family.latent_shape(folder, teacher.resolution)[-1],
        text_tokens=max_sequence_length,
        shift=family.shift(folder, teacher.resolution),
        encoder_parameters=_encoder_parameters(folder),
    )


def _transformer_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "transformer/config.json")
    return {key: value for key, value in config.items() if key[0] != "_"}


def _encoder_parameters(folder: Path) -> int:
    """Parameters of the text encoders that a pipeline's index names, from their configs."""
    import transformers

    total = 0
    for name, kind in _json(folder / "model_index.json").items():
        if name.startswith("text_encoder") and kind[0] == "transformers":
            model = getattr(transformers, kind[1])
            with torch.device("meta"):
                encoder = model(model.config_class.from_pretrained(folder / name))
            total += sum(parameter.numel() for parameter in encoder.parameters())
    return total


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CdmError(f"{path}: not a readable config of a diffusers folder ({error})") from None


_FROM_FOLDER: dict[str, Callable[[Path, Teacher, int], Architecture]] = {
    "sd3": _sd3_from_folder,
    "longcat": _packed_from_folder,
    "flux": _packed_from_folder,
}
_KNOWN: dict[tuple[str, str], Callable[[int, int], Architecture]] = {
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers"): sd3_medium,
    ("longcat", "meituan-longcat/LongCat-Image"): longcat_image,
    ("flux", "black-forest-labs/FLUX.1-dev"): flux_dev,
}
_PACKED = {"longcat": "LongCatImageTransformer2DModel", "flux": "FluxTransformer2DModel"}
