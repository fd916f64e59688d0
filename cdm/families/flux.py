"""FLUX.1: packed latents beside T5's tokens, with CLIP's vector of the whole text.

FLUX.1-dev is guidance-distilled: a scale of guidance is an input of its transformer. Here that input is always
`EMBEDDED_GUIDANCE`, for the teacher and for a student, so that a student draws with the pipeline's defaults. What
`teacher.guidance_scale` and the guidance term of the loss mean is real classifier-free guidance on top, against the
empty prompt (`true_cfg_scale` in diffusers); a teacher as people use it has 1, which is none. FLUX.1-schnell, without
that input, works the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.families.base import Family, Published
from cdm.families.common import (
    ATTENTION,
    CLIP_L,
    DYNAMIC_SHIFT,
    FEED_FORWARD,
    FLUX_LAYERS,
    KL_AUTOENCODER,
    POOLED,
    SINGLE_STREAM,
    T5_XXL,
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

EMBEDDED_GUIDANCE = 3.5
"""The pipeline's default `guidance_scale`."""


def _published(*, guidance_embeds: bool, scheduler: dict[str, Any]) -> Published:
    """One of the two FLUX.1 models, which differ in their input for guidance and in their scheduler alone."""
    transformer = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance_embeds,
    }
    return Published(
        {TRANSFORMER: transformer, SCHEDULER: scheduler, AUTOENCODER: KL_AUTOENCODER}, CLIP_L + T5_XXL
    )


class Flux(Family):
    name = "flux"
    pipeline_class_name = "FluxPipeline"
    transformer_class_name = "FluxTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    attention_layers: ClassVar = [*ATTENTION, *TEXT_ATTENTION]
    feed_forward_layers: ClassVar = [*FEED_FORWARD, *TEXT_FEED_FORWARD, *SINGLE_STREAM]
    original_layers: ClassVar = FLUX_LAYERS
    published: ClassVar = {
        "black-forest-labs/FLUX.1-dev": _published(guidance_embeds=True, scheduler=DYNAMIC_SHIFT),
        "black-forest-labs/FLUX.1-schnell": _published(guidance_embeds=False, scheduler={"shift": 1.0}),
    }

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        config, length = read_config(source, TRANSFORMER), self.text_tokens(max_sequence_length)
        return {TOKENS: (length, config["joint_attention_dim"]), POOLED: (config["pooled_projection_dim"],)}

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = self.text_tokens(max_sequence_length)
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=length)
        return {TOKENS: tokens, POOLED: pooled}

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {
            "guidance_scale": EMBEDDED_GUIDANCE,
            "max_sequence_length": max_sequence_length or self.default_tokens,
        }

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        config: Any = transformer.config
        with exact_time(transformer.get_submodule("time_text_embed"), 1000 * sigma):
            tokens = transformer(
                pack(x),
                timestep=sigma,
                guidance=torch.full_like(sigma, EMBEDDED_GUIDANCE) if config.guidance_embeds else None,
                txt_ids=torch.zeros(conditioning[TOKENS].shape[1], 3, device=x.device),
                img_ids=grid_positions(height, width, x.device),
                return_dict=False,
                **conditioning,
            )[0]
        return unpack(tokens, height, width)


FAMILY: Family = Flux()
