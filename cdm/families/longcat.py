"""LongCat-Image: packed latents and text tokens in one sequence, distinguished by position ids; Qwen2.5-VL reads the
text.

Prompts are encoded as they are written. The pipeline's own rewriting of prompts, on by default there, is a step of its
own before a prompt list is made: pass `enable_prompt_rewrite=False` to compare with diffusers.
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
    FEED_FORWARD,
    FLUX_LAYERS,
    KL_AUTOENCODER,
    QWEN2_5_VL_7B,
    SINGLE_STREAM,
    TEXT_ATTENTION,
    TEXT_FEED_FORWARD,
    TOKENS,
    Conditioning,
    exact_time,
    grid_positions,
    pack,
    unpack,
)
from cdm.families.configs import AUTOENCODER, SCHEDULER, TRANSFORMER, Configs, read_config


class LongCatImage(Family):
    name = "longcat"
    pipeline_class_name = "LongCatImagePipeline"
    transformer_class_name = "LongCatImageTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer"]
    attention_layers: ClassVar = [*ATTENTION, *TEXT_ATTENTION]
    feed_forward_layers: ClassVar = [*FEED_FORWARD, *TEXT_FEED_FORWARD, *SINGLE_STREAM]
    original_layers: ClassVar = FLUX_LAYERS
    published: ClassVar = {
        "meituan-longcat/LongCat-Image": Published(
            {
                TRANSFORMER: {  # half the blocks of FLUX.1, which are the defaults of its class in diffusers
                    "in_channels": 64,
                    "num_layers": 10,
                    "num_single_layers": 20,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 3584,
                    "pooled_projection_dim": 3584,
                },
                SCHEDULER: DYNAMIC_SHIFT,
                AUTOENCODER: KL_AUTOENCODER,
            },
            QWEN2_5_VL_7B,
        )
    }

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        width = read_config(source, TRANSFORMER)["joint_attention_dim"]
        return {TOKENS: (self.text_tokens(max_sequence_length), width)}

    def left_out(self, source: Path, *, text: bool, image: bool, transformer: bool) -> list[str]:
        parts = super().left_out(source, text=text, image=image, transformer=transformer)
        return [*parts, "text_processor"]  # it only rewrites prompts

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        pipeline.tokenizer_max_length = self.text_tokens(max_sequence_length)
        with torch.no_grad():
            tokens, _ = pipeline.encode_prompt(prompts)
        return {TOKENS: tokens}

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {"enable_prompt_rewrite": False}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        length = conditioning[TOKENS].shape[1]
        along = torch.arange(length, device=x.device, dtype=torch.float32)
        # The first number tells text from image; the picture lies beyond the text in both others.
        text = torch.stack([torch.zeros_like(along), along, along], dim=1)
        image = grid_positions(height, width, x.device) + torch.tensor([1, length, length], device=x.device)
        with exact_time(transformer.get_submodule("time_embed"), 1000 * sigma):
            tokens = transformer(
                pack(x), timestep=sigma, txt_ids=text, img_ids=image, return_dict=False, **conditioning
            )[0]
        return unpack(tokens, height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """With the pipeline's renormalisation: no token's velocity is longer than without guidance."""
        guided, unguided = pack(super().guide(cond, uncond, scale)), pack(cond)
        ratio = unguided.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
        return unpack(guided * ratio.clamp(max=1), *cond.shape[-2:])


FAMILY: Family = LongCatImage()
