"""HPS v2 or v2.1 as a transformers CLIPModel, for the measure `hps`.

The checkpoint is xswu/HPSv2's, of an open_clip ViT-H-14; config, tokeniser and preprocessor are those of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the same architecture. The published checkpoint itself has not been converted
here: the names are checked on a small model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cdm.system.writing import placed

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Modules of a layer, by their names in open_clip."""
PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""open_clip multiplies by these from the right."""


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip model under the names of a CLIPModel. Raises KeyError for one that is not known."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tower, marker, rest = name.partition("transformer.resblocks.")
        if marker:
            number, _, part = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            module, _, kind = part.rpartition(".")
            if module == "attn":  # in_proj_weight or in_proj_bias: query, key and value in one
                for each, third in zip("qkv", weight.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{each}_proj.{kind.removeprefix('in_proj_')}"] = third
            else:
                found[f"{layer}.{LAYER[module]}.{kind}"] = weight
        elif name in TRANSPOSED:
            found[TRANSPOSED[name]] = weight.T
        else:
            found[PLAIN[name]] = weight
    return {name: weight.contiguous().clone() for name, weight in found.items()}


def convert_files(files: Mapping[str, Path], out: Path) -> None:
    """Write the folder `out`, in place of an older one, from the checkpoint (.pt) and the small files of the base
    model, each by its name."""
    from transformers import CLIPConfig, CLIPModel

    checkpoint = next(path for name, path in files.items() if name.endswith(".pt"))
    small = {name: path for name, path in files.items() if not name.endswith(".pt")}
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    config = CLIPConfig.from_pretrained(small["config.json"])
    model = CLIPModel(config)
    model.load_state_dict(convert(loaded.get("state_dict", loaded)))
    with placed(out) as folder:
        model.save_pretrained(folder)
        for name, path in small.items():
            if name != "config.json":
                shutil.copy(path, folder / name)
