"""Stable Diffusion 3 Medium as it is published, or another of a `Scale`, in fp16 safetensors files of random numbers.

Files are written tensor by tensor, so that no model is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.scale import DEFAULT, Scale
from cdm.families.configs import TRANSFORMER
from cdm.families.folder import STEMS
from cdm.families.weights import write

NUMBERS = 2**22
"""Random numbers that all tensors share, each beginning elsewhere."""
SPREAD = 0.02
"""Their standard deviation: activations stay finite."""


def transformer(folder: Path, blocks: int | None = None, scale: Scale = DEFAULT) -> None:
    """The transformer alone, or with so many of its blocks, as a part of `folder`."""
    from diffusers import SD3Transformer2DModel

    config = dict(scale.architecture.configs[TRANSFORMER])
    config |= {"num_layers": blocks or config["num_layers"]}
    with torch.device("meta"):
        model: Any = SD3Transformer2DModel(**config)
    _save(model, folder / "transformer", "diffusers")


def pipeline(folder: Path, scale: Scale = DEFAULT) -> None:
    """The whole pipeline: with CLIP-L, CLIP-bigG, T5-XXL and the autoencoder, and tokenizers of few words."""
    import diffusers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    from miniature.teacher import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    letters = [("▁", -2.0), *((chr(code), -3.0) for code in range(ord("a"), ord("z") + 1))]
    words = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device("meta"):
        models: dict[str, tuple[str, Any]] = {
            "text_encoder": (
                "transformers",
                CLIPTextModelWithProjection(CLIPTextConfig(**scale.clip_l, **ends)),
            ),
            "text_encoder_2": (
                "transformers",
                CLIPTextModelWithProjection(CLIPTextConfig(**scale.clip_g, **ends)),
            ),
            "text_encoder_3": ("transformers", T5EncoderModel(T5Config(**scale.t5))),
            "vae": ("diffusers", diffusers.AutoencoderKL(**scale.autoencoder)),
        }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": words}
    empty = diffusers.StableDiffusion3Pipeline(
        scheduler=scheduler,
        **tokenizers,
        **dict.fromkeys(["transformer", *models]),
    )
    empty.save_pretrained(folder)
    kinds = {"transformer": ("diffusers", "SD3Transformer2DModel")}
    for part, (library, model) in models.items():
        kinds[part] = (library, type(model).__name__)
        _save(model, folder / part, library)
    _name_parts(folder, kinds)
    transformer(folder, scale=scale)


def _name_parts(folder: Path, kinds: dict[str, tuple[str, str]]) -> None:
    """Names the parts in the pipeline's index."""
    import json

    from cdm.families.configs import INDEX, read_config

    index = read_config(folder, INDEX) | {part: list(kind) for part, kind in kinds.items()}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(model: nn.Module, folder: Path, library: str) -> None:
    """The config of a model on the meta device, and random weights."""
    config: Any = model
    model.to(torch.float16)
    config.save_config(folder) if library == "diffusers" else config.config.save_pretrained(folder)
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    tied = [
        name for name in tensors if name.endswith("encoder.embed_tokens.weight") and "shared.weight" in tensors
    ]
    for name in tied:  # which is stored once
        del tensors[name]
    write(folder, tensors, _random(tensors), stem=STEMS[library])


def _random(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Random numbers for matrices and biases, ones for the weights of normalisations."""
    numbers = SPREAD * torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    numbers = numbers.half()
    for place, (name, like) in enumerate(tensors.items()):
        if like.ndim == 1 and name.endswith("weight"):
            yield name, torch.ones(like.shape, dtype=torch.float16)
        else:
            rolled = numbers.roll(-(place * 7919) % NUMBERS)
            times = -(-like.numel() // NUMBERS)
            yield name, rolled.repeat(times)[: like.numel()].view(like.shape)
