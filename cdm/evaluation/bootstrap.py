"""Errors of figures: over the choice of prompts (bootstrap), and over the samples' noise (jackknife).

Pictures of one prompt stay together, and all sample sets are resampled alike, so that the error of a difference of
two sets is that of paired figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdm.measures import FEWEST_PROMPTS
from cdm.randomness import philox

NORMAL = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""
FEWEST_BLOCKS = 4
"""Fewest blocks for which there is a jackknife."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it was in resamples of the prompts."""

    value: float
    replicates: Tensor
    """float64 (resamples,); only their spread means something. Empty where no error is known."""

    @property
    def error(self) -> float | None:
        """The standard error: the deviation of the replicates; None where no error is known."""
        return self.replicates.std().item() if len(self.replicates) > 1 else None

    def minus(self, other: Estimate) -> Estimate:
        """The difference to a figure of the same resamples."""
        known = len(self.replicates) == len(other.replicates)
        replicates = self.replicates - other.replicates if known else self.replicates[:0]
        return Estimate(self.value - other.value, replicates)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: the figure and 1.96 standard errors on either side; None where no error is known."""
        if self.error is None:
            return None
        return self.value - NORMAL * self.error, self.value + NORMAL * self.error


@dataclass(frozen=True)
class Resampling:
    """`count` resamples of `prompts` prompts; none with fewer than 8 prompts."""

    prompts: int
    count: int
    seed: int

    @property
    def _number(self) -> int:
        return self.count if self.prompts >= FEWEST_PROMPTS else 0

    @cached_property
    def _repeated(self) -> Tensor:
        """Indices of prompts, drawn with repeats: (resamples, prompts)."""
        drawn = philox(self.seed, "bootstrap").integers(self.prompts, size=(self._number, self.prompts))
        return torch.from_numpy(drawn)

    @cached_property
    def _halves(self) -> list[Tensor]:
        """A random half of the prompts for each resample."""
        generators = (philox(self.seed, "half samples", i) for i in range(self._number))
        return [torch.from_numpy(each.permutation(self.prompts)[: self.prompts // 2]) for each in generators]

    def mean(self, values: Tensor) -> Estimate:
        """The mean of a figure of each prompt, float64 (prompts,), with the ordinary bootstrap."""
        return Estimate(values.mean().item(), values[self._repeated].mean(1))

    def of_sets(self, measure: Callable[[Tensor | None], Mapping[str, float]]) -> dict[str, Estimate]:
        """Figures of whole sets; `measure` takes the prompts whose pictures count, or None for all of them.

        A picture that counts twice would be its own nearest neighbour and make a set look less varied. So a
        resample is a random half of the prompts without repeats; the variance of a mean over m of n is
        (1/m - 1/n) of that of one prompt, which is brought to the 1/n of all of them.
        """
        values = measure(None)
        rows = [measure(half) for half in self._halves]
        half = self.prompts // 2
        factor = (half / (self.prompts - half)) ** 0.5 if half else 0.0
        return {
            name: Estimate(value, factor * torch.tensor([row[name] for row in rows], dtype=torch.float64))
            for name, value in values.items()
        }


def jackknife(statistic: Callable[[Tensor], float], blocks: Tensor) -> Estimate:
    """`statistic(indices of the samples)` of all samples, and its error by leaving out one block of samples at a time.

    `blocks`: (n,) integers, the block of each sample; blocks are independent of each other. A replicate belongs to a
    block: they are scaled so that their deviation is the jackknife's standard error. With fewer than 4 blocks, too few
    to say anything, there are none.
    """
    whole, names = statistic(torch.arange(len(blocks))), blocks.unique()
    count = len(names)
    if count < FEWEST_BLOCKS:
        return Estimate(whole, torch.empty(0))
    left = torch.tensor([statistic(torch.nonzero(blocks != name)[:, 0]) for name in names], dtype=torch.float64)
    return Estimate(whole, whole - (left - left.mean()) * ((count - 1) / count**0.5))
