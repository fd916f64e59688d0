"""Distances between two sets of points in the plane: (n, 2) each, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIRECTIONS = 64
"""Angles over which the sliced distance is averaged."""


def energy_distance(a: Tensor, b: Tensor) -> float:
    """`2 E|a - b| - E|a - a'| - E|b - b'|`: 0 for equal distributions, and for no others (Székely and Rizzo 2013).

    Unbiased: a sample is never paired with itself, so finite sets of one distribution give figures around 0.
    """
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """1-Wasserstein distance of the projections on a line, averaged over the line's angle.

    Sets of equal size. ValueError otherwise.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected sets of equal size, not {len(a)} and {len(b)}")
    angles = torch.arange(DIRECTIONS, dtype=a.dtype) * math.pi / DIRECTIONS
    lines = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ lines).sort(0).values - (b @ lines).sort(0).values).abs().mean())
