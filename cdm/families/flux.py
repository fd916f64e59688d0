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

from cdm.families.base import Conditioning, Family
from cdm.families.common import (
    ATTENTION,
    POOLED,
    TEXT_ATTENTION,
    TOKENS,
    DiffusersFamily,
    grid_positions,
    pack,
    token_limit,
    unpack,
)

EMBEDDED_GUIDANCE = 3.5
"""The pipeline's default `guidance_scale`."""


class Flux(DiffusersFamily):
    name = "flux"
    pipeline_class_name = "FluxPipeline"
    transformer_class_name = "FluxTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    lora_targets: ClassVar = [*ATTENTION, *TEXT_ATTENTION]

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = token_limit(max_sequence_length, default=512, most=512)
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=length)
        return {TOKENS: tokens, POOLED: pooled}

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {
            "guidance_scale": EMBEDDED_GUIDANCE,
            "max_sequence_length": max_sequence_length or 512,
        }

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        config: Any = transformer.config
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
