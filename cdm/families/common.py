"""What families have in common: folders and their configs, loading and saving, packing, and a loop that samples."""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.base import Conditioning
from cdm.system.progress import quieten_libraries

PATCH = 2
"""Latents on a side of an image token, in every architecture here."""
SCHEDULER = "scheduler/scheduler_config.json"
TOKENS, MASK, POOLED = "encoder_hidden_states", "encoder_hidden_states_mask", "pooled_projections"
"""Names in a conditioning: of the text's tokens, of which of them are real, and of what stands for the whole text."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The attention layers in most of diffusers' transformers."""
TEXT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""The same, for the text in a stream of its own."""


class DiffusersFamily(ABC):
    """A family whose parts are diffusers': a subclass names them, and says what its transformer takes and returns."""

    name: ClassVar[str]
    pipeline_class_name: ClassVar[str]
    transformer_class_name: ClassVar[str]
    text_components: ClassVar[list[str]]
    """Parts of the pipeline that only encode prompts."""
    lora_targets: ClassVar[list[str]]
    resolution: ClassVar[int] = 1024
    """Pixels on a side of a picture, where nobody says otherwise."""

    # Configs.

    def latent_channels(self, source: Path) -> int:
        """Channels of the latents: here, of the autoencoder."""
        return int(read_config(source, "vae/config.json")["latent_channels"])

    def pixels_per_latent(self, source: Path) -> int:
        """Pixels on a side of one latent."""
        return 2 ** (len(read_config(source, "vae/config.json")["block_out_channels"]) - 1)

    def latent_shape(self, source: Path, resolution: int | None = None) -> tuple[int, ...]:
        resolution = resolution or self.resolution
        pixels = self.pixels_per_latent(source)
        if resolution % (pixels * PATCH):
            nearest = max(round(resolution / (pixels * PATCH)), 1) * pixels * PATCH
            raise CdmError(
                f"teacher.resolution is {resolution}, but this model draws multiples of {pixels * PATCH} pixels:"
                f" use {nearest}"
            )
        return self.latent_channels(source), resolution // pixels, resolution // pixels

    def shift(self, source: Path, resolution: int | None = None) -> float:
        scheduler = read_config(source, SCHEDULER)
        if not scheduler.get("use_dynamic_shifting"):
            return float(scheduler.get("shift", 1.0))
        mu = dynamic_shift(scheduler, self.latent_shape(source, resolution))
        return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)

    # Loading and saving.

    def left_out(self, source: Path, *, text: bool, image: bool, transformer: bool) -> list[str]:
        """Parts of the pipeline that are not loaded."""
        del source
        parts = [] if text else list(self.text_components)
        return parts + ([] if image else ["vae"]) + ([] if transformer else ["transformer"])

    def load_pipeline(
        self,
        source: Path,
        *,
        text: bool = True,
        image: bool = True,
        transformer: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Any:
        left_out = self.left_out(source, text=text, image=image, transformer=transformer)
        pipeline = load(self.pipeline_class_name, source, dtype, **dict.fromkeys(left_out))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def load_transformer(self, source: Path, dtype: torch.dtype | None = None) -> nn.Module:
        transformer: nn.Module = load(self.transformer_class_name, source, dtype, subfolder="transformer")
        return transformer.eval()

    def save_student(self, transformer: nn.Module, source: Path, folder: Path) -> None:
        shutil.rmtree(folder / "transformer", ignore_errors=True)
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", ".*"))
        save: Any = transformer.save_pretrained  # of every diffusers model
        save(folder / "transformer")
        scheduler = read_config(folder, SCHEDULER)
        if scheduler.get("shift_terminal") is not None:  # see `set_scheduler`
            (folder / SCHEDULER).write_text(json.dumps(scheduler | {"shift_terminal": None}, indent=2) + "\n")

    def save_lora(self, weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
        from safetensors.torch import save_file

        # Not by diffusers' own writer: it puts two entries in random order, so that files differ from run to run.
        metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"transformer.{name}": value.contiguous() for name, value in weights.items()},
            folder / LORA_WEIGHT_NAME_SAFE,
            metadata={LORA_ADAPTER_METADATA_KEY: metadata},
        )

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        # Not by the pipeline's loader: some have none, and the others miss the text encoders where they are not loaded.
        load_adapter = pipeline.transformer.load_lora_adapter
        try:
            load_adapter(folder, weight_name=LORA_WEIGHT_NAME_SAFE, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CdmError(f"{folder}: cannot be loaded as a LoRA: {' '.join(str(error).split())}") from None

    # Conditioning. Where no vector stands for a whole prompt, all its tokens do.

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        """See `Family.encode`."""

    def embedding_width(self, conditioning: Conditioning) -> int:
        return conditioning.get(POOLED, conditioning[TOKENS]).shape[-1]

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        if POOLED in conditioning:
            return conditioning | {POOLED: conditioning[POOLED] + embedding}
        return conditioning | {TOKENS: conditioning[TOKENS] + embedding[:, None]}

    # Sampling.

    @abstractmethod
    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family.velocity`."""

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        return uncond + scale * (cond - uncond)

    def sample(
        self,
        pipeline: Any,
        noise: Tensor,
        conditioning: Conditioning,
        empty: Conditioning,
        sigmas_unshifted: list[float],
        guidance_scale: float,
    ) -> Tensor:
        scheduler = set_scheduler(pipeline.scheduler, noise.shape[1:], sigmas_unshifted, noise.device)
        negative = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in empty.items()}
        x = noise
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                sigma = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
                velocity = self.velocity(pipeline.transformer, x, sigma, conditioning)
                if guidance_scale != 1:
                    uncond = self.velocity(pipeline.transformer, x, sigma, negative)
                    velocity = self.guide(velocity, uncond, guidance_scale)
                x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        height, width = (size * self.pixels_per_latent(source) for size in latent_shape[-2:])
        return {"height": height, "width": width, "guidance_scale": 1.0}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return to_unit_range(images)


def read_config(source: Path, name: str) -> dict[str, Any]:
    """The JSON file `name` of a diffusers folder; raises CdmError if it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((source / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CdmError(f"{source / name}: not a readable config of a diffusers folder ({error})") from None
    return config


def load(class_name: str, source: Path, dtype: torch.dtype | None, **options: Any) -> Any:
    """What diffusers' class of that name reads from `source`, as safetensors; raises CdmError if it cannot."""
    import diffusers

    quieten_libraries()
    try:
        return getattr(diffusers, class_name).from_pretrained(
            source, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CdmError(f"{source}: cannot be loaded as {class_name}: {' '.join(str(error).split())}") from None


def token_limit(asked: int | None, default: int, most: int) -> int:
    """`asked` text tokens, or the `default`; raises CdmError unless they are 1 to `most`."""
    tokens = default if asked is None else asked
    if not 1 <= tokens <= most:
        raise CdmError(f"prompts.max_sequence_length is {tokens}: this model takes 1 to {most} text tokens")
    return tokens


def pad_tokens(texts: Sequence[Tensor], length: int) -> Conditioning:
    """Texts (tokens, width) of different lengths as `length` tokens each, behind the real ones zeros, with the mask."""
    width = texts[0].shape[-1]
    tokens = torch.stack([torch.cat([text, text.new_zeros(length - len(text), width)]) for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
    return {TOKENS: tokens, MASK: torch.arange(length, device=tokens.device) < lengths[:, None]}


def dynamic_shift(scheduler: dict[str, Any], latent_shape: tuple[int, ...]) -> float:
    """The `mu` that diffusers shifts a picture by: linear in its image tokens, through two points in the config."""
    tokens = latent_shape[-1] * latent_shape[-2] // PATCH**2
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low_mu, high_mu = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return float(low_mu + (tokens - low) * (high_mu - low_mu) / (high - low))


def set_scheduler(scheduler: Any, latent_shape: tuple[int, ...], sigmas: list[float], device: Any) -> Any:
    """A pipeline's scheduler, set to the levels `sigmas` before the shift, for latents of that shape.

    Without a stretch of the levels to a terminal one: a student is trained at the levels that it is asked for.
    """
    fresh = type(scheduler).from_config(scheduler.config, shift_terminal=None)
    mu = dynamic_shift(fresh.config, latent_shape) if fresh.config.use_dynamic_shifting else None
    fresh.set_timesteps(sigmas=sigmas, mu=mu, device=device)
    return fresh


def pack(latents: Tensor) -> Tensor:
    """Latents (batch, channels, height, width) as image tokens (batch, height/2 * width/2, 4 * channels)."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`, for latents of that height and width."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return nn.functional.pixel_shuffle(grid, PATCH)


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Where the image tokens of latents of that height and width are: (tokens, 3) of 0, row, column; float32."""
    rows, columns = (
        torch.arange(size // PATCH, device=device, dtype=torch.float32) for size in (height, width)
    )
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)


def to_unit_range(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as float32 in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)
