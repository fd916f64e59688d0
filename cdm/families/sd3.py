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
        if not transformer and "text_encoder_3" not in parts:  # else its width is that of T5's stand-in
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

    @staticmethod
    def default_length(with_t5: bool) -> int:
        """The pipeline's default, or none of the zeros that stand in for T5."""
        return 256 if with_t5 else 0

    def default_length_of(self, source: Configs) -> int:
        """The default for the pipeline in a folder."""
        return self.default_length((read_config(source, INDEX).get("text_encoder_3") or [None])[0] is not None)

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        if max_sequence_length is None:
            max_sequence_length = self.default_length_of(source)
        config, clip_tokens = (
            read_config(source, TRANSFORMER),
            read_config(source, TOKENIZER)["model_max_length"],
        )
        return {
            TOKENS: (clip_tokens + max_sequence_length, config["joint_attention_dim"]),
            POOLED: (config["pooled_projection_dim"],),
        }

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        if max_sequence_length is None:
            max_sequence_length = self.default_length(pipeline.text_encoder_3 is not None)
        if pipeline.text_encoder_3 and max_sequence_length == 0:
            raise CdmError("max_sequence_length is 0, but the model has a T5 encoder: give it up to 512 tokens")
        with torch.no_grad():
            text, _, pooled, _ = pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
        return {TOKENS: text, POOLED: pooled}

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        if max_sequence_length is None:
            max_sequence_length = self.default_length_of(source)
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {"max_sequence_length": max_sequence_length}

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
