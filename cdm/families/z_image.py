"""Z-Image: image and text tokens of each sample in one sequence; Qwen3 reads the text.

Its transformer takes 1 - sigma as time and predicts x0 - noise, the opposite of this project. `guidance_scale` here is
1 for no guidance, as everywhere in this project; the diffusers pipeline counts from 0, so that 5 here is 4 there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.families.base import Family, Published
from cdm.families.common import ATTENTION, KL_AUTOENCODER, MASK, TOKENS, Conditioning, pad_tokens
from cdm.families.configs import AUTOENCODER, SCHEDULER, TRANSFORMER, Configs, read_config

QWEN3_4B = 4_022_468_096
"""Parameters of the text encoder."""


def _published(shift: float) -> Published:
    """One of the published models, which differ in their scheduler alone."""
    transformer = {
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }
    return Published(
        {TRANSFORMER: transformer, SCHEDULER: {"shift": shift}, AUTOENCODER: KL_AUTOENCODER}, QWEN3_4B
    )


def _original_layers() -> dict[str, list[str]]:
    """See `Family.original_layers`: the attention's layers have other names, the others the same."""
    layers = {}
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        layers[f"{blocks}.attention.qkv"] = [f"{blocks}.attention.to_{each}" for each in "qkv"]
        layers[f"{blocks}.attention.out"] = [f"{blocks}.attention.to_out.0"]
        for name in ("w1", "w2", "w3"):
            layers[f"{blocks}.feed_forward.{name}"] = [f"{blocks}.feed_forward.{name}"]
    return layers


class ZImage(Family):
    name = "z_image"
    pipeline_class_name = "ZImagePipeline"
    transformer_class_name = "ZImageTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer"]
    chat_template = True
    attention_layers: ClassVar = ATTENTION
    feed_forward_layers: ClassVar = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    original_layers: ClassVar = _original_layers()
    published: ClassVar = {
        "Tongyi-MAI/Z-Image": _published(shift=6.0),
        "Tongyi-MAI/Z-Image-Turbo": _published(shift=3.0),
    }

    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        length = self.text_tokens(max_sequence_length)
        return {TOKENS: (length, read_config(source, TRANSFORMER)["cap_feat_dim"]), MASK: (length,)}

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = self.text_tokens(max_sequence_length)
        with torch.no_grad():
            texts, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
            )  # which writes into the list
        return pad_tokens(texts, length)

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {
            "guidance_scale": 0.0,
            "max_sequence_length": max_sequence_length or self.default_tokens,
        }

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        texts = list(conditioning[TOKENS])
        if MASK in conditioning:
            texts = [text[real] for text, real in zip(texts, conditioning[MASK], strict=True)]
        frames = list(x[:, :, None])  # pictures as videos of one frame
        return -torch.stack(transformer(frames, 1 - sigma, texts, return_dict=False)[0])[:, :, 0]


FAMILY: Family = ZImage()
