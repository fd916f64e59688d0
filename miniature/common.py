"""What the miniature's training scripts share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from tqdm import tqdm

PARAMS = Path("miniature/params.yaml")


def load_params(section: str) -> tuple[int, dict[str, Any]]:
    """The seed and one section of miniature/params.yaml."""
    params = YAML(typ="safe").load(PARAMS)
    return params["seed"], params[section]


def optimiser(parameters: Any, lr: float, iterations: int) -> tuple[torch.optim.Optimizer, Any]:
    """Fused AdamW with a one-cycle learning rate."""
    adamw = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    return adamw, torch.optim.lr_scheduler.OneCycleLR(adamw, lr, total_steps=iterations, pct_start=0.05)


def progress(iterations: int, title: str) -> Iterator[int]:
    """Counts iterations behind a progress bar that a log file sees twice a minute."""
    return iter(tqdm(range(iterations), desc=title, mininterval=1 if sys.stderr.isatty() else 30))
