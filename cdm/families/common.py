"""Functions and constants that families share: configs of a diffusers folder, loading, packing and positions, and
schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.system.progress import quieten_libraries

Conditioning = dict[str, Tensor]
"""The conditioning on prompts: tensors (batch, ...), keyed by the transformer's own argument names where it takes them
as they are. Rows of all prompts have one shape, so that they can be stored and mixed: shorter texts are padded, and
where the transformer minds, a mask (batch, tokens), bool, says which tokens are real. Without a mask all are."""

PATCH = 2
"""Latents on a side of an image token, in every architecture here."""
TOKENS, MASK, POOLED = "encoder_hidden_states", "encoder_hidden_states_mask", "pooled_projections"
"""Names in a conditioning: of the text's tokens, of which of them are real, and of what stands for the whole text."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The attention layers in most of diffusers' transformers."""
TEXT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""The same, for the text in a stream of its own."""

T5_XXL, CLIP_L = 4_762_310_656, 123_060_480
QWEN2_5_VL_7B = 8_292_166_656
"""Parameters of text encoders that published models share; CLIP-L without its projection."""
DYNAMIC_SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""The scheduler of FLUX.1-dev and of the models after it, whose shift grows with the picture."""
KL_AUTOENCODER = {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
"""The autoencoder of Stable Diffusion 3 and of FLUX.1, with a latent for 8 x 8 pixels."""


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


@contextmanager
def exact_time(embedding: nn.Module, time: Tensor) -> Iterator[None]:
    """Meanwhile a transformer's `embedding` of time sees `time` (batch,), whatever its first argument is.

    Some of diffusers' transformers take the time in the type of their tokens. In bfloat16 `1000 sigma` above 512 is
    then a multiple of 4: the network would be asked at another level than that of the noise in its input.
    """
    seen = embedding.register_forward_pre_hook(lambda _, arguments: (time, *arguments[1:]))
    try:
        yield
    finally:
        seen.remove()


def to_unit_range(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as float32 in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)
