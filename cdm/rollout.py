"""Sampling with the student: Euler steps to each sample's anchor (backward simulation; paper, section 3.1), or
to data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cdm.flow import euler_step
from cdm.schedule import Rollouts

Conditioning = dict[str, Tensor]
Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x, sigma, conditioning) -> velocity, all batch first."""


def take(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """The conditioning of some samples of a batch."""
    return {name: value[rows] for name, value in conditioning.items()}


@torch.no_grad()
def simulate(
    velocity: Velocity, noise: Tensor, conditioning: Conditioning, rollouts: Rollouts, calls: int = 0
) -> Tensor:
    """The anchors `x_i` (batch, ...): `noise` taken `rollouts.depth` Euler steps along each sample's schedule.

    With the batch sorted by depth, the samples that still move at a step are its head: no step runs on samples
    that have arrived, which halves the cost of running all of them to the end. Where several processes must call
    a network equally often, `calls` is how often; those beyond the deepest sample change nothing.
    """
    order = sorted(range(len(rollouts.depth)), key=lambda row: -rollouts.depth[row])
    rows = torch.tensor(order, device=noise.device)
    x, sigmas, sorted_conditioning = noise[rows], rollouts.sigmas[rows], take(conditioning, rows)
    for step in range(max(rollouts.depth)):
        moving = slice(0, sum(depth > step for depth in rollouts.depth))
        sigma, next_sigma = sigmas[moving, step], sigmas[moving, step + 1]
        v = velocity(x[moving], sigma, take(sorted_conditioning, moving))
        x[moving] = euler_step(x[moving], v.float(), sigma, next_sigma)
    for _ in range(max(rollouts.depth), calls):
        velocity(x[:1], sigmas[:1, 0], take(sorted_conditioning, slice(0, 1)))
    anchors = torch.empty_like(x)
    anchors[rows] = x
    return anchors


@torch.no_grad()
def integrate(velocity: Velocity, noise: Tensor, conditioning: Conditioning, sigmas: Tensor) -> Tensor:
    """Deterministic Euler sampling from `noise` along `sigmas` (steps,), and from its last level to data."""
    x = noise
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]).to(noise.device)
    for sigma, next_sigma in pairwise(levels):
        sigma, next_sigma = sigma.expand(len(x)), next_sigma.expand(len(x))
        x = euler_step(x, velocity(x, sigma, conditioning).float(), sigma, next_sigma)
    return x
