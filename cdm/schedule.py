"""Noise levels: the student's rollout schedules and the levels of re-noising (paper, section 3.1).

Levels fall from 1.0 (noise). Schedules are drawn before the teacher's timestep shift and shifted at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cdm.flow import shift_sigmas
from cdm.params import Schedule
from cdm.randomness import Draws

Spacing = Literal["stratified", "independent"]


def dynamic_schedule(
    length: int, sigma_min: float, sigma_max: float, spacing: Spacing, generator: torch.Generator
) -> Tensor:
    """A random schedule: (length,) float32, falling, the first level 1.0, the others in [sigma_min, sigma_max].

    `stratified` draws one level in each of `length - 1` equal bins, `independent` draws them all from the whole
    range. Raises ValueError for a length below 1, an empty range or an unknown spacing.
    """
    if length < 1:
        raise ValueError(f"length is {length}, expected at least 1")
    if not 0 < sigma_min < sigma_max <= 1:
        raise ValueError(f"expected 0 < sigma_min < sigma_max <= 1, not {sigma_min} and {sigma_max}")
    inner = torch.rand(length - 1, generator=generator)
    if spacing == "stratified":
        inner = (torch.arange(length - 1) + inner) / max(length - 1, 1)
    elif spacing != "independent":
        raise ValueError(f"spacing is {spacing!r}, expected 'stratified' or 'independent'")
    levels = sigma_min + (sigma_max - sigma_min) * inner
    return torch.cat([torch.ones(1), levels.sort(descending=True).values])


@dataclass(frozen=True)
class Rollouts:
    """The schedules of a batch, and the anchor at which each sample's rollout stops.

    sigmas: (batch, longest) shifted levels, padded with 0 behind a sample's own; depth: for each sample the index
    of its anchor, uniform over its schedule, which is also the number of steps it must take to get there.
    """

    sigmas: Tensor
    depth: list[int]

    @property
    def anchor_sigma(self) -> Tensor:
        """The level of each sample's anchor: (batch,)."""
        rows = torch.arange(len(self.depth), device=self.sigmas.device)
        return self.sigmas[rows, torch.tensor(self.depth, device=self.sigmas.device)]

    @property
    def next_sigma(self) -> Tensor:
        """The level to which each sample steps from its anchor, 0 from the last: (batch,)."""
        levels = torch.nn.functional.pad(self.sigmas, (0, 1))
        rows = torch.arange(len(self.depth), device=levels.device)
        return levels[rows, torch.tensor(self.depth, device=levels.device) + 1]


def draw_rollouts(schedule: Schedule, shift: float, draws: Draws) -> Rollouts:
    """A schedule and an anchor for each sample (step 1 of an iteration).

    The paper draws one length a batch; here every sample has a length of its own. The expectation is the same, the
    gradient varies less, and iterations cost nearly the same, so that no process waits for another.
    """
    if schedule.kind == "fixed":
        levels = [torch.tensor(schedule.sigmas)] * len(draws.samples)
    else:
        spread = draws.integers("length", schedule.max_len - schedule.min_len + 1)
        levels = [
            dynamic_schedule(
                schedule.min_len + extra, schedule.sigma_min, schedule.sigma_max, schedule.spacing, generator
            )
            for extra, generator in zip(spread, draws.generators("schedule"), strict=True)
        ]
    position = draws.uniform("anchor").tolist()
    depth = [min(int(u * len(row)), len(row) - 1) for u, row in zip(position, levels, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(levels, batch_first=True)
    return Rollouts(shift_sigmas(padded, shift).to(draws.device), depth)


def off_trajectory_levels(schedule: Schedule, uniform: Tensor, limits: tuple[float, float]) -> Tensor:
    """Levels of the off-trajectory points, not shifted (paper, section 3.3), from `uniform` numbers in [0, 1).

    U[sigma_min, sigma_max], or U over `off_range`, of which what lies outside the `limits` becomes these.
    """
    low, high = schedule.off_range or (schedule.sigma_min, schedule.sigma_max)
    levels = low + (high - low) * uniform
    return levels if schedule.off_range is None else levels.clamp(*limits)
