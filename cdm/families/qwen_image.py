"""Qwen-Image: packed latents beside the tokens of Qwen2.5-VL, in an autoencoder made for video.

Its published scheduler stretches the levels so that the last is 0.02 whatever the number of steps. A student is
trained without that, and so is the teacher sampled; a saved student's scheduler has `shift_terminal` null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.families.base import Conditioning, Family
from cdm.families.common import (
    ATTENTION,
    TEXT_ATTENTION,
    DiffusersFamily,
    pack,
    pad_tokens,
    read_config,
    to_unit_range,
    token_limit,
    unpack,
)


class QwenImage(DiffusersFamily):
    name = "qwen_image"
    pipeline_class_name = "QwenImagePipeline"
    transformer_class_name = "QwenImageTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer"]
    lora_targets: ClassVar = [*ATTENTION, *TEXT_ATTENTION]

    def latent_channels(self, source: Path) -> int:
        return int(read_config(source, "vae/config.json")["z_dim"])

    def pixels_per_latent(self, source: Path) -> int:
        return 2 ** len(read_config(source, "vae/config.json")["temperal_downsample"])

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = token_limit(max_sequence_length, default=512, most=1024)
        with torch.no_grad():
            tokens, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
        texts = (
            list(tokens)
            if mask is None
            else [text[real.bool()] for text, real in zip(tokens, mask, strict=True)]
        )
        return pad_tokens(texts, length)

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        del options["guidance_scale"]  # of guidance-distilled models
        return options | {"true_cfg_scale": 1.0, "max_sequence_length": max_sequence_length or 512}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens = transformer(
            pack(x),
            timestep=sigma,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
            **conditioning,
        )[0]
        return unpack(tokens, height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """With the pipeline's renormalisation: each token's velocity is as long as without guidance."""
        guided, unguided = pack(super().guide(cond, uncond, scale)), pack(cond)
        ratio = unguided.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * ratio, *cond.shape[-2:])

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = (
            torch.tensor(numbers, device=latents.device, dtype=vae.dtype)[:, None, None]
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = (latents.to(vae.dtype) * std + mean)[:, :, None]  # a video of one frame
        with torch.no_grad():
            images: Tensor = vae.decode(frames, return_dict=False)[0][:, :, 0]
        return to_unit_range(images)


FAMILY: Family = QwenImage()
