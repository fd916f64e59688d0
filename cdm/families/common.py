"""Functions and constants that families share: configs of a diffusers folder, loading, packing and positions,
schedulers, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdm.errors import CdmError, line
from cdm.families.folder import plain_view
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
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
"""The feed-forward layers in most of them."""
TEXT_FEED_FORWARD = ["ff_context.net.0.proj", "ff_context.net.2"]
"""The same, for the text in a stream of its own."""
SINGLE_STREAM = ["proj_mlp", "single_transformer_blocks.*.proj_out"]
"""The feed-forward layers of FLUX.1's blocks with a single stream; the second has the attention's output in it too."""

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
KL_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
"""The autoencoder of Stable Diffusion 3 and of FLUX.1, with a latent for 8 x 8 pixels."""


def in_block(*layers: str, of: str = "transformer_blocks") -> list[str]:
    """Names of `layers` in a block of the list `of`, with {} for its number."""
    return [f"{of}.{{}}.{layer}" for layer in layers]


FLUX_LAYERS = {
    "double_blocks.{}.img_attn.qkv": in_block("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks.{}.img_attn.proj": in_block("attn.to_out.0"),
    "double_blocks.{}.img_mlp.0": in_block("ff.net.0.proj"),
    "double_blocks.{}.img_mlp.2": in_block("ff.net.2"),
    "double_blocks.{}.txt_attn.qkv": in_block("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks.{}.txt_attn.proj": in_block("attn.to_add_out"),
    "double_blocks.{}.txt_mlp.0": in_block("ff_context.net.0.proj"),
    "double_blocks.{}.txt_mlp.2": in_block("ff_context.net.2"),
    "single_blocks.{}.linear1": in_block(
        "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", of="single_transformer_blocks"
    ),
    "single_blocks.{}.linear2": in_block("proj_out", of="single_transformer_blocks"),
}
"""`Family.original_layers` of FLUX.1, and of LongCat-Image, which has its blocks."""


def load(class_name: str, source: Path, dtype: torch.dtype | None, **options: Any) -> Any:
    """What diffusers' class of that name reads from `source`, as safetensors; raises CdmError if it cannot."""
    import diffusers

    quieten_libraries()
    with plain_view(source) as view, loading(class_name, source, view):
        loaded = getattr(diffusers, class_name).from_pretrained(
            view, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True, **options
        )
    if view != source:  # which is gone, and no two are called alike: a student is saved with this name
        for each in getattr(loaded, "components", {"": loaded}).values():
            if hasattr(each, "register_to_config"):
                each.register_to_config(_name_or_path=str(source))
    return loaded


@contextmanager
def loading(class_name: str, source: Path, view: Path | None = None) -> Iterator[None]:
    """Makes a CdmError, which names `source`, of whatever goes wrong while it is loaded, as `view` if that is given."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever libraries make of a folder that is damaged
        problem = str(error).replace(str(view or source), str(source))
        raise CdmError(line(f"{source}: cannot be loaded as {class_name}: {problem}")) from None


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


def check_finite(values: Mapping[str, Tensor], pipeline: Any, where: object, precision: str) -> None:
    """Raises CdmError if a number in `values`, which `pipeline` has made, is NaN or infinite.

    The message names a broken weight of the pipeline, if there is one. `where` is what the pipeline was loaded from,
    `precision` the parameter that sets its arithmetic.
    """
    bad = sorted(name for name, value in values.items() if not is_finite(value))
    if not bad:
        return
    weight = broken_weight(pipeline)
    if weight is not None:
        raise CdmError(f"{where}: {weight} holds numbers that are not finite: get the model again")
    raise CdmError(
        f"{where}: its {', '.join(bad)} are not finite, though all its weights are: numbers grow too large in"
        f" this precision (set {precision} to fp32), or the weights are of another model"
    )


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return not value.is_floating_point() or bool(value.isfinite().all())


def broken_weight(pipeline: Any) -> str | None:
    """The first weight of a pipeline's parts that is not finite, as `part: name`; None if there is none."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part, model in parts.items():
        for name, value in model.state_dict().items():
            if not is_finite(value):
                return f"{part}: {name}"
    return None
