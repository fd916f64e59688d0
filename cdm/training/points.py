"""Points at which networks are called in a round: anchors on the student's trajectory, and re-noised samples.

Tensors are (batch, ...), noise levels (batch,), as in `cdm.flow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cdm.flow import add_noise, euler_step, renoise, velocity_to_x0
from cdm.params import Distill
from cdm.randomness import Draws
from cdm.rollout import Conditioning, take


@dataclass
class Anchor:
    """The points where the rollouts of some samples stop: `x` (batch, ...) at noise level `sigma` (batch,).

    Once the student has been evaluated there, `velocity` is its prediction, with its graph if `keeps_graph`.
    `end` (batch,) is the noise level of what is matched; None stands for data.
    """

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    samples: Sequence[int]
    keeps_graph: bool
    velocity: Tensor | None = None
    end: Tensor | None = None
    _predicted: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def x0(self) -> Tensor:
        """The student's prediction of the data; `velocity` must be there.

        All terms share this tensor, so that their gradients meet in it before they go on to the network.
        """
        assert self.velocity is not None
        if self._predicted is None or self._predicted[0] is not self.velocity:
            self._predicted = (self.velocity, velocity_to_x0(self.x, self.velocity, self.sigma))
        return self._predicted[1]

    @property
    def output(self) -> Tensor:
        """What is matched, without a graph: the student's data, or the state at `end` to which it steps."""
        assert self.velocity is not None
        if self.end is None:
            return self.x0.detach()
        return euler_step(self.x, self.velocity.detach(), self.sigma, self.end)


class Query(NamedTuple):
    """Points at which a network predicts x0."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning


class Renoised(NamedTuple):
    """The student's output, re-noised with `noise` to level `tau`."""

    x: Tensor
    tau: Tensor
    noise: Tensor

    def query(self, conditioning: Conditioning, rows: Tensor | slice = slice(None)) -> Query:
        """The query at these points, or at some rows of them."""
        return Query(self.x[rows], self.tau[rows], take(conditioning, rows))


def renoise_output(
    output: Tensor,
    draws: Draws,
    purpose: str,
    distill: Distill,
    *,
    bound: Tensor | None = None,
    end: Tensor | None = None,
    level: str = "tau",
) -> Renoised:
    """Data, or states of level `end`, re-noised to tau ~ U(0 or `end`, `bound` or 1).

    Levels are kept within `renoise_min` and `renoise_max` of `distill`, off the ends where directions blow up or
    vanish. The random numbers are those that `draws` has for `purpose`.
    """
    low, high = distill.renoise_min, distill.renoise_max
    tau = draws.uniform(f"{purpose}_{level}")
    noise = draws.normal(f"{purpose}_noise", output.shape[1:])
    if end is None:
        tau = (tau if bound is None else tau * bound).clamp(low, high)
        return Renoised(add_noise(output, noise, tau), tau, noise)
    tau = end + tau * ((1.0 if bound is None else bound) - end)
    tau = torch.maximum(tau, end + low).clamp(low, high)
    return Renoised(renoise(output, noise, end, tau), tau, noise)


def with_level(conditioning: Conditioning, sigma: Tensor, distill: Distill) -> Conditioning:
    """The fake score's conditioning for data that the student made at noise level `sigma`.

    It holds the level where `distill.fake_knows_level` asks for it.
    """
    return conditioning | {"level": sigma[:, None]} if distill.fake_knows_level else conditioning
