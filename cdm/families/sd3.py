"""Stable Diffusion 3 and 3.5: an MMDiT on square latents; two CLIP text encoders and, where the folder has one, T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.base import Family, Published, expand_to_batch
from cdm.families.common import (
    ATTENTION,
    FEED_FORWARD,
    KL_AUTOENCODER,
    POOLED,
    T5_XXL,
    TEXT_ATTENTION,
    TEXT_FEED_FORWARD,
    TOKENS,
    Conditioning,
    in_block,
    token_limit,
)
from cdm.families.configs import AUTOENCODER, INDEX, SCHEDULER, TRANSFORMER, Configs, read_config

TOKENIZER = "tokenizer/tokenizer_config.json"
CLIPS = 123_650_304 + 694_659_840
"""Parameters of CLIP-L and of OpenCLIP-bigG, with their projections."""


def _published(blocks: int, **transformer: Any) -> Published:
    """One of the published models: all have `blocks` blocks and as many heads of 64, the same text encoders and the
    same shift."""
    width = 64 * blocks
    sizes: dict[str, Any] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": 64,
        "num_attention_heads": blocks,
        "joint_attention_dim": 4096,
        "caption_projection_dim": width,
        "pooled_projection_dim": 2048,
    }
    return Published(
        {
            INDEX: {"text_encoder_3": ["transformers", "T5EncoderModel"]},
            TRANSFORMER: sizes | transformer,
            SCHEDULER: {"shift": 3.0},
            AUTOENCODER: KL_AUTOENCODER,
            TOKENIZER: {"model_max_length": 77},
        },
        CLIPS + T5_XXL,
    )


class StableDiffusion3(Family):
    name = "sd3"
    pipeline_class_name = "StableDiffusion3Pipeline"
    transformer_class_name = "SD3Transformer2DModel"
    text_components: ClassVar = [
        f"{kind}{suffix}" for suffix in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer")
    ]
    optional_components: ClassVar = ["text_encoder_3", "tokenizer_3"]
    attention_layers: ClassVar = [*ATTENTION, *TEXT_ATTENTION]
    feed_forward_layers: ClassVar = [*FEED_FORWARD, *TEXT_FEED_FORWARD]
    original_layers: ClassVar = {
        "joint_blocks.{}.x_block.attn.qkv": in_block("attn.to_q", "attn.to_k", "attn.to_v"),
        "joint_blocks.{}.x_block.attn.proj": in_block("attn.to_out.0"),
        "joint_blocks.{}.x_block.attn2.qkv": in_block("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{}.x_block.attn2.proj": in_block("attn2.to_out.0"),
        "joint_blocks.{}.x_block.mlp.fc1": in_block("ff.net.0.proj"),
        "joint_blocks.{}.x_block.mlp.fc2": in_block("ff.net.2"),
        "joint_blocks.{}.context_block.attn.qkv": in_block(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "joint_blocks.{}.context_block.attn.proj": in_block("attn.to_add_out"),
        "joint_blocks.{}.context_block.mlp.fc1": in_block("ff_context.net.0.proj"),
        "joint_blocks.{}.context_block.mlp.fc2": in_block("ff_context.net.2"),
    }
    published: ClassVar = {
        "stabilityai/stable-diffusion-3-medium-diffusers": _published(24, pos_embed_max_size=192),
        "stabilityai/stable-diffusion-3.5-medium": _published(
            24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=range(13)
        ),
        "stabilityai/stable-diffusion-3.5-large": _published(38, pos_embed_max_size=192, qk_norm="rms_norm"),
    }

    def left_out(self, source: Path, *, text: bool, image: bool, transformer: bool) -> list[str]:
        index = read_config(source, INDEX)
        parts = [name for name in self.text_components if not text or not (index.get(name) or [None])[0]]
        if not image:
            parts.append("vae")
        if not transformer and not (text and "text_encoder_3" in parts):  # whose stand-in is as wide as it says
            parts.append("transformer")
        return parts

    def latent_channels(self, source: Configs) -> int:
        return int(read_config(source, TRANSFORMER)["in_channels"])

    def latent_shape(self, source: Configs, resolution: int | None = None) -> tuple[int, ...]:
        config = read_config(source, TRANSFORMER)
        if resolution is None:
            return config["in_channels"], config["sample_size"], config["sample_size"]
        shape = super().latent_shape(source, resolution)
        largest = config["pos_embed_max_size"] * config["patch_size"]
        if shape[-1] > largest:
            most = largest * self.pixels_per_latent(source)
            raise CdmError(f"teacher.resolution is {resolution}, but this model draws up to {most} pixels")
        return shape

    def t5_tokens(self, asked: int | None, with_t5: bool) -> int:
        """Tokens that T5 reads, or rows of zeros that stand in for it: as many as are asked for, or else the
        pipeline's default and none of the zeros. Raises CdmError if the pipeline does not take so many."""
        if with_t5:
            return token_limit(asked, 256, self.most_tokens)
        if (asked or 0) > self.most_tokens:
            raise CdmError(
                f"prompts.max_sequence_length is {asked}: this model has no T5 encoder, whose place zeros take: set"
                " it to 0"
            )
        return asked or 0

    def t5_tokens_of(self, source: Configs, asked: int | None) -> int:
        """`t5_tokens` of the pipeline in a folder."""
        encoder = (read_config(source, INDEX).get("text_encoder_3") or [None])[0]
        return self.t5_tokens(asked, with_t5=encoder is not None)

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        config, clip_tokens = (
            read_config(source, TRANSFORMER),
            read_config(source, TOKENIZER)["model_max_length"],
        )
        tokens = clip_tokens + self.t5_tokens_of(source, max_sequence_length)
        return {
            TOKENS: (tokens, config["joint_attention_dim"]),
            POOLED: (config["pooled_projection_dim"],),
        }

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = self.t5_tokens(max_sequence_length, with_t5=pipeline.text_encoder_3 is not None)
        with torch.no_grad():
            text, _, pooled, _ = pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
        return {TOKENS: text, POOLED: pooled}

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {"max_sequence_length": self.t5_tokens_of(source, max_sequence_length)}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = transformer(x, timestep=1000 * sigma, return_dict=False, **conditioning)[0]
        return velocity

    def sample(
        self,
        pipeline: Any,
        noise: Tensor,
        conditioning: Conditioning,
        empty: Conditioning,
        sigmas_unshifted: list[float],
        guidance_scale: float,
    ) -> Tensor:
        negative = expand_to_batch(empty, len(noise))
        height, width = (size * pipeline.vae_scale_factor for size in noise.shape[-2:])
        latents: Tensor = pipeline(
            prompt_embeds=conditioning[TOKENS],
            pooled_prompt_embeds=conditioning[POOLED],
            negative_prompt_embeds=negative[TOKENS],
            negative_pooled_prompt_embeds=negative[POOLED],
            height=height,
            width=width,
            latents=noise,
            sigmas=sigmas_unshifted,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
        return latents


FAMILY: Family = StableDiffusion3()
