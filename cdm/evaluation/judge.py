"""A small classifier of named attributes, whose inner features also measure distances between sets of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cdm.system.writing import placed

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class JudgeOutput(NamedTuple):
    """`logits` by attribute, each (batch, classes); `features` (batch, 64): the penultimate layer; `style`
    (batch, 144): mean and deviation over space of the first two layers, which see blur and contrast."""

    logits: dict[str, torch.Tensor]
    features: torch.Tensor
    style: torch.Tensor


@dataclass(frozen=True)
class JudgeConfig:
    """`attributes`: the class names of each attribute; `widths`: channels of the convolutions."""

    attributes: dict[str, list[str]]
    widths: tuple[int, ...] = (24, 48, 64, 96, 64)


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """Five convolutions, global average pooling and one linear head an attribute."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        channels = (3, *config.widths)
        strides = (1, 2, 1, 2, 1)
        self.blocks = nn.ModuleList(
            _block(channels[i], channels[i + 1], stride) for i, stride in enumerate(strides)
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(channels[-1], len(values)) for name, values in config.attributes.items()}
        )

    def forward(self, images: torch.Tensor) -> JudgeOutput:
        """`images`: (batch, 3, height, width) in [0, 1]."""
        hidden = images * 2 - 1
        style = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden)
            if i < 2:
                flat = hidden.flatten(2)
                style += [flat.mean(-1), flat.std(-1)]
        features = hidden.mean((-2, -1))
        logits = {name: head(features) for name, head in self.heads.items()}
        return JudgeOutput(logits, features, torch.cat(style, dim=1))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"attributes": self.config.attributes, "widths": list(self.config.widths)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        with placed(folder / WEIGHTS) as path:
            save_file(self.state_dict(), path)

    @classmethod
    def load(cls, folder: Path) -> Judge:
        config = json.loads((folder / CONFIG).read_text())
        judge = cls(JudgeConfig(config["attributes"], tuple(config["widths"])))
        judge.load_state_dict(load_file(folder / WEIGHTS))
        return judge.eval().requires_grad_(False)
