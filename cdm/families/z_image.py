"""Z-Image: image and text tokens of each sample in one sequence; Qwen3 reads the text.

Its transformer is told 1 - sigma and answers with x0 - noise, the opposite of this project. `guidance_scale` here is
1 for no guidance, as everywhere in this project; the diffusers pipeline counts from 0, so that 5 here is 4 there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.families.base import Conditioning, Family
from cdm.families.common import ATTENTION, MASK, TOKENS, DiffusersFamily, pad_tokens, token_limit


class ZImage(DiffusersFamily):
    name = "z_image"
    pipeline_class_name = "ZImagePipeline"
    transformer_class_name = "ZImageTransformer2DModel"
    text_components: ClassVar = ["text_encoder", "tokenizer"]
    lora_targets: ClassVar = ATTENTION

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        length = token_limit(max_sequence_length, default=512, most=512)
        with torch.no_grad():
            texts, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
            )  # which writes into the list
        return pad_tokens(texts, length)

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        options = super().call_options(source, latent_shape, max_sequence_length)
        return options | {"guidance_scale": 0.0, "max_sequence_length": max_sequence_length or 512}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        texts = [text[real] for text, real in zip(conditioning[TOKENS], conditioning[MASK], strict=True)]
        frames = list(x[:, :, None])  # pictures as videos of one frame
        return -torch.stack(transformer(frames, 1 - sigma, texts, return_dict=False)[0])[:, :, 0]


FAMILY: Family = ZImage()
