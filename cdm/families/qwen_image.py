"""Qwen-Image: packed latents beside the tokens of Qwen2.5-VL, in an autoencoder made for video.

Its published scheduler stretches the levels so that the last is 0.02 whatever the number of steps. A student is
trained without that, and so is the teacher sampled; a saved student's scheduler has `shift_terminal` null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.families.base import Family, Published
from cdm.families.common import (
    ATTENTION,
    DYNAMIC_SHIFT,
    MASK,
    QWEN2_5_VL_7B,
    TEXT_ATTENTION,
    TOKENS,
    Conditioning,
    exact_time,
    in_block,
    pack,
    pad_tokens,
    to_unit_range,
    unpack,
)
from cdm.families.configs import AUTOENCODER, SCHEDULER, TRANSFORMER, Configs, read_config

MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]


class QwenImage(Family):
    name = "qwen_image"
    pipeline_class_name = "QwenImagePipeline"
    transformer_class_name = "QwenImageTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer"]
    attention_layers: ClassVar = [*ATTENTION, *TEXT_ATTENTION]
    feed_forward_layers: ClassVar = MLP
    original_layers: ClassVar = {
        name: [name] for name in in_block(*(f"attn.{end}" for end in attention_layers), *MLP)
    }
    most_tokens = 1024
    published: ClassVar = {
        "Qwen/Qwen-Image": Published(
            {
                TRANSFORMER: {
                    "in_channels": 64,
                    "out_channels": 16,
                    "num_layers": 60,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 3584,
                },
                SCHEDULER: DYNAMIC_SHIFT | {"max_image_seq_len": 8192, "max_shift": 0.9},
                AUTOENCODER: {
                    "_class_name": "AutoencoderKLQwenImage",
                    "z_dim": 16,
                    "temperal_downsample": [False, True, True],
                },
            },
            QWEN2_5_VL_7B,
        )
    }

    def latent_channels(self, source: Configs) -> int:
        return int(read_config(source, AUTOENCODER)["z_dim"])

    def pixels_per_latent(self, source: Configs) -> int:
        return 2 ** len(read_config(source, AUTOENCODER)["temperal_downsample"])

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        config, length = read_config(source, TRANSFORMER), self.text_tokens(max_sequence_length)
        return {TOKENS: (length, config["joint_attention_dim"]), MASK: (length,)}

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = self.text_tokens(max_sequence_length)
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
        return options | {
            "true_cfg_scale": 1.0,
            "max_sequence_length": max_sequence_length or self.default_tokens,
        }

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        with exact_time(transformer.get_submodule("time_text_embed"), sigma):
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
