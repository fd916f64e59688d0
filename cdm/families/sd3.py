"""Stable Diffusion 3 and 3.5: an MMDiT on square latents; two CLIP text encoders and, where the folder has one, T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.base import Conditioning, Family
from cdm.families.common import ATTENTION, POOLED, TEXT_ATTENTION, TOKENS, DiffusersFamily, read_config


class StableDiffusion3(DiffusersFamily):
    name = "sd3"
    pipeline_class_name = "StableDiffusion3Pipeline"
    transformer_class_name = "SD3Transformer2DModel"
    text_components: ClassVar = [
        f"{kind}{suffix}" for suffix in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer")
    ]
    lora_targets: ClassVar = [*ATTENTION, *TEXT_ATTENTION]

    def left_out(self, source: Path, *, text: bool, image: bool, transformer: bool) -> list[str]:
        index = read_config(source, "model_index.json")
        parts = [name for name in self.text_components if not text or not (index.get(name) or [None])[0]]
        if not image:
            parts.append("vae")
        if not transformer and "text_encoder_3" not in parts:  # else its width is that of T5's stand-in
            parts.append("transformer")
        return parts

    def latent_channels(self, source: Path) -> int:
        return int(read_config(source, "transformer/config.json")["in_channels"])

    def latent_shape(self, source: Path, resolution: int | None = None) -> tuple[int, ...]:
        config = read_config(source, "transformer/config.json")
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
            with_t5 = (read_config(source, "model_index.json").get("text_encoder_3") or [None])[0] is not None
            max_sequence_length = self.default_length(with_t5)
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
        negative = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in empty.items()}
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
