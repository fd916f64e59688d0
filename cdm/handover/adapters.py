"""A LoRA as other programs take it: its strength in its factors alone, and ComfyUI's names of layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import Family

FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of an adapter's factors: (rank, columns) and (rows, rank). What a layer learns is their product."""
PREFIX = "transformer."
COMFYUI = "diffusion_model."
"""In front of a layer's name in a file for ComfyUI."""


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors of the LoRA in `folder`, by the names of the transformer's layers, and peft's config of it.

    If the file's header has a factor beside them (alpha / rank), it is multiplied into the second ones: programs that
    do not read it would draw with another strength. Raises CdmError if the file cannot be read.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

    path = folder / LORA_WEIGHT_NAME_SAFE
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[LORA_ADAPTER_METADATA_KEY])
        weights = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CdmError(f"{path}: not a readable LoRA ({' '.join(str(error).split())})") from None
    config = {name.removeprefix(PREFIX): value for name, value in header.items()}
    scale = config["lora_alpha"] / config["r"]
    factors = {
        name.removeprefix(PREFIX): value * scale if name.endswith(SECOND) else value
        for name, value in weights.items()
    }
    return factors, config | {"lora_alpha": config["r"]}


def for_comfyui(family: Family, transformer: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `factors` under the names that ComfyUI gives the layers of `transformer`, which need not have its weights.

    ComfyUI has the layers of the model's authors. Where several layers of diffusers are one of these, as queries, keys
    and values are, its first factor is theirs one below the other, and its second one has theirs on its diagonal: the
    product is the same. Raises CdmError for a layer whose name there is not known.
    """
    rows = {
        name: module.out_features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    left = {name.removesuffix(FIRST) for name in factors if name.endswith(FIRST)}
    found = {}
    for name, parts in _numbered(family, rows):
        learnt = [part for part in parts if part in left]
        if not learnt:
            continue
        found[f"{COMFYUI}{name}{FIRST}"] = torch.cat([factors[part + FIRST] for part in learnt])
        dtype = factors[learnt[0] + SECOND].dtype
        seconds = [
            factors[part + SECOND] if part in left else torch.zeros(rows[part], 0, dtype=dtype)
            for part in parts
        ]
        found[f"{COMFYUI}{name}{SECOND}"] = torch.block_diag(*seconds)
        left -= set(learnt)
    if left:
        raise CdmError(
            f"the layer {min(left)} has no name in ComfyUI that is known here: use the format lora or diffusers"
        )
    return found


def _numbered(family: Family, rows: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """`Family.original_layers` of every block that there is: ComfyUI's name, and those in diffusers."""
    numbers = {int(part) for name in rows for part in name.split(".") if part.isdigit()}
    layers = []
    for number in sorted(numbers):
        for name, parts in family.original_layers.items():
            those = [part.format(number) for part in parts]
            if all(part in rows for part in those):
                layers.append((name.format(number), those))
    return layers
