"""Tiny random models of the real classes, for the metrics."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch

PROJECTION = 12


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel of 16-pixel pictures with its tokeniser and preprocessing, as a folder of the hub."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from miniature.teacher import build_tokenizer

    tokenizer = build_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=PROJECTION,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_vocabulary(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def write_vocabulary(folder: Path) -> None:
    """The two files that the hub's CLIP folders have beside tokenizer.json."""
    learnt = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def write_dinov2(folder: Path) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder
    )
    return folder


def write_inception(path: Path) -> Path:
    from cdm.evaluation.models.inception import Inception

    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Inception()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.running_var, module.weight):
                    torch.nn.init.uniform_(values, 0.8, 1.25)
                for values in (module.running_mean, module.bias):
                    torch.nn.init.normal_(values, std=0.1)
        torch.save(network.state_dict(), path)
    return path


def write_lpips(folder: Path) -> Path:
    from cdm.evaluation.models import lpips

    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = lpips._alexnet()
        weights = {f"features.{name}": weight for name, weight in network.state_dict().items()}
        weights["classifier.1.weight"] = torch.zeros(2, 2)  # the backbone's file has what LPIPS leaves aside
        torch.save(weights, folder / lpips.BACKBONE)
        widths = [network[layer - 1].out_channels for layer in lpips.LAYERS]
        linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
        torch.save(linear, folder / lpips.LINEAR)
    return folder


def write_aesthetic(path: Path) -> Path:
    """A head of three linear layers, with dropout between them as in the published one: layers 0, 2 and 3."""
    generator = torch.Generator().manual_seed(4)
    widths = [PROJECTION, 8, 4, 1]
    weights = {}
    for name, (inside, outside) in zip((0, 2, 3), pairwise(widths), strict=True):
        weights[f"layers.{name}.weight"] = torch.randn(outside, inside, generator=generator)
        weights[f"layers.{name}.bias"] = torch.randn(outside, generator=generator)
    torch.save(weights, path)
    return path
