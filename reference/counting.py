"""Networks that count what they are asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cdm.rollout import Conditioning
from cdm.training.networks import FullNetworks, Role


class CountingNetworks(FullNetworks):
    """Counts calls and samples by role, apart for those that keep a graph (`student+graph`).

    A forward that carries a derivative along counts as two.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        key = f"{role}+graph" if role != "teacher" and torch.is_grad_enabled() else role
        carries = forward_ad.unpack_dual(x).tangent is not None
        self.samples[key] += (1 + carries) * len(x)
        self.calls[key] += 1
        return super().velocity(role, x, sigma, conditioning)

    def forward_equivalents(self, samples: int) -> float:
        """Forwards a sample, a forward with its backward counting 3."""
        with_graph = sum(count for key, count in self.samples.items() if key.endswith("+graph"))
        return (self.samples.total() + 2 * with_graph) / samples
