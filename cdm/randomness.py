"""Random numbers as a function of (seed, purpose, iteration, global sample index), and of nothing else.

So a resumed run needs no generator states, a run does not depend on how many processes share its batch or on
the device, and student and teacher are compared on the same noise. Numbers come from NumPy's Philox, a
counter-based generator with a 128-bit key; torch's CPU generator keeps only 32 bits of its seed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def _key(*parts: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def philox(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """An independent generator for each combination of arguments."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, *indices)))


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Initial noise of the evaluation samples `indices`: (len(indices), *shape), float32, on the CPU."""
    rows = [philox(seed, "evaluation", index).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows))


def picture_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise (1, *shape) of a single picture, float32, on the CPU.

    These are the numbers that a diffusers pipeline in float32 draws where it is given
    `generator=torch.Generator().manual_seed(seed)`, whatever the device.
    """
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = philox(seed, "prompts", epoch).permutation(count).tolist()
    return order


def prompt_indices(seed: int, positions: Sequence[int], count: int) -> list[int]:
    """Which of `count` prompts stand at these positions of an endless sequence that shuffles them every epoch."""
    return [_shuffled(seed, position // count, count)[position % count] for position in positions]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one iteration, for the global sample indices `samples`."""

    seed: int
    iteration: int
    samples: Sequence[int]
    device: torch.device = torch.device("cpu")
    mirrored: bool = False

    def mirror(self) -> Draws:
        """The antithetic numbers: -z for each normal z, 1 - u for each uniform u. Integers and generators stay."""
        return replace(self, mirrored=not self.mirrored)

    def _rows(self, purpose: str) -> list[np.random.Generator]:
        return [philox(self.seed, purpose, self.iteration, sample) for sample in self.samples]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (batch, *shape), float32."""
        rows = [row.standard_normal(shape, dtype=np.float32) for row in self._rows(purpose)]
        numbers = torch.from_numpy(np.stack(rows)).to(self.device)
        return -numbers if self.mirrored else numbers

    def uniform(self, purpose: str) -> Tensor:
        """A number in [0, 1), mirrored in (0, 1], for each sample: (batch,), float32."""
        rows = [row.random(dtype=np.float32) for row in self._rows(purpose)]
        numbers = torch.tensor(rows, dtype=torch.float32, device=self.device)
        return 1 - numbers if self.mirrored else numbers

    def integers(self, purpose: str, high: int) -> list[int]:
        """An integer in [0, high) for each sample."""
        return [int(row.integers(high)) for row in self._rows(purpose)]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A torch generator on the CPU for each sample, for functions that take one."""
        seeds = [int(row.integers(2**63)) for row in self._rows(purpose)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]
