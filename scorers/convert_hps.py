"""HPS v2 or v2.1 as a transformers CLIPModel, for the metric `hps`; runs in this project's own environment.

    python scorers/convert_hps.py HPS_v2.1_compressed.pt BASE OUT

The checkpoint is xswu/HPSv2's, of an open_clip ViT-H-14. BASE is a folder with config.json and the tokeniser's and
preprocessor's files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the same architecture; its weights are not needed. The
published checkpoint itself has not been converted here: the names are checked on a small model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

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


def main() -> None:
    """Write the folder OUT."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("base", type=Path)
    options.add_argument("out", type=Path)
    arguments = options.parse_args()
    from transformers import CLIPConfig, CLIPModel

    loaded = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    model = CLIPModel(CLIPConfig.from_pretrained(arguments.base))
    model.load_state_dict(convert(loaded.get("state_dict", loaded)))
    model.save_pretrained(arguments.out)
    for path in (*arguments.base.glob("*.json"), *arguments.base.glob("*.txt")):
        if not (arguments.out / path.name).exists() and "index" not in path.name:
            shutil.copy(path, arguments.out)


if __name__ == "__main__":
    main()
