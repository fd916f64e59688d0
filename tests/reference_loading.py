"""Loading a transformer without this project: what networks that are read from mapped files are compared with."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from cdm.families import Family

TYPES = (torch.float32, torch.bfloat16)


def reference(family: Family, folder: Path) -> nn.Module:
    """The transformer in float32, by diffusers."""
    kind = getattr(diffusers, family.transformer_class_name)
    transformer: nn.Module = kind.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    return transformer
