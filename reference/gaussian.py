"""An exact teacher: the optimal velocity of Gaussian data is known in closed form.

For data N(mean, deviation^2) the posterior mean of x0 given x at level sigma is linear in x; the optimal velocity
follows. Conditioning is the mean itself, so that every sample may have a class of its own; a student or fake score
is the same formula with learnt numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdm.families.base import PromptEmbedding
from cdm.flow import expand


def optimal_x0(x: Tensor, sigma: Tensor, mean: Tensor, deviation: Tensor | float) -> Tensor:
    """E[x0 | x] for x0 ~ N(mean, deviation^2), x = (1 - sigma) x0 + sigma noise."""
    s = expand(sigma, x)
    variance = torch.as_tensor(deviation) ** 2
    gain = (1 - s) * variance / ((1 - s) ** 2 * variance + s**2)
    return mean + gain * (x - (1 - s) * mean)


def optimal_velocity(x: Tensor, sigma: Tensor, mean: Tensor, deviation: Tensor | float) -> Tensor:
    """E[noise - x0 | x], from x0 = x - sigma * velocity."""
    return (x - optimal_x0(x, sigma, mean, deviation)) / expand(sigma, x)


class GaussianModel(nn.Module):
    """A network whose velocity is optimal for N(offset + scale * mean, deviation^2): `offset` and `deviation` learn."""

    def __init__(
        self, dimensions: int, offset: float = 0.0, deviation: float = 1.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((dimensions,), offset))
        self.log_deviation = nn.Parameter(torch.tensor(deviation).log())
        self.scale = scale

    def forward(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        return optimal_velocity(x, sigma, self.offset + self.scale * mean, self.log_deviation.exp())


class GaussianFlowMap(GaussianModel):
    """The consistency function of N(offset + scale * mean, deviation^2) as a velocity: `x - sigma * velocity` is where
    the flow through x at level sigma ends, so that it makes exactly this distribution in any number of steps."""

    def forward(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        s, mean, deviation = expand(sigma, x), self.offset + self.scale * mean, self.log_deviation.exp()
        spread = ((1 - s) ** 2 * deviation**2 + s**2).sqrt()
        return (x - mean - deviation * (x - (1 - s) * mean) / spread) / s


class GaussianFamily(PromptEmbedding):
    """Just enough of a family for `FullNetworks`: conditioning is {"mean": (batch, dimensions)}."""

    name = "gaussian"

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        velocity: Tensor = transformer(x, sigma, conditioning["mean"])
        return velocity

    def embedding_width(self, conditioning: dict[str, Tensor]) -> int:
        return conditioning["mean"].shape[-1]

    def add_embedding(self, conditioning: dict[str, Tensor], embedding: Tensor) -> dict[str, Tensor]:
        return conditioning | {"mean": conditioning["mean"] + embedding}
