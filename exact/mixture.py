"""A Gaussian mixture with classes, of which everything that a diffusion model learns is known in closed form.

With data x0 from the mixture and `x = (1 - sigma) * x0 + sigma * noise`, x is again a mixture, of the same weights:
component k is N((1 - sigma) m_k, (1 - sigma)^2 C_k + sigma^2 I). Given x and k, data and noise have linear posterior
means; what is left is a weighted sum over the components. All of it is done in the components' eigenbases, so that
every sample may have a level of its own, and in float64. Class -1 is all classes together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cdm.rollout import Conditioning, Velocity

ALL = -1
"""The class that stands for the whole mixture: what a teacher knows without a prompt."""


class _Marginal(NamedTuple):
    """The mixture at some points and levels, by component: (batch, components), and (batch, components, d)."""

    log_joint: Tensor  # log(weight * density), -inf for components of another class
    whitened: Tensor  # S^-1 (x - (1 - sigma) m), S the covariance at the level, in the component's eigenbasis


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights (k,), summing to 1; means (k, d); covariances (k, d, d), positive definite; classes (k,): the class
    of each component, from 0. Made by `from_components`, which checks them."""

    weights: Tensor
    means: Tensor
    covariances: Tensor
    classes: Tensor

    @classmethod
    def from_components(
        cls,
        means: Sequence[Sequence[float]] | Tensor,
        spreads: float | Sequence[float] | Tensor,
        classes: Sequence[int] | Tensor | None = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> Mixture:
        """A mixture in float64. `spreads` is one deviation, one a component (k,), or covariances (k, d, d); by
        default all components are of class 0 and weigh the same. ValueError where the parts do not fit."""
        centres = torch.as_tensor(means, dtype=torch.float64)
        count, dimensions = centres.shape
        spread = torch.as_tensor(spreads, dtype=torch.float64)
        if spread.ndim < 2:
            spread = spread.expand(count)[:, None, None] ** 2 * torch.eye(dimensions, dtype=torch.float64)
        if spread.shape != (count, dimensions, dimensions) or torch.linalg.eigvalsh(spread).min() <= 0:
            raise ValueError(f"expected {count} positive definite covariances of {dimensions} dimensions")
        share = torch.ones(count) if weights is None else torch.as_tensor(weights)
        label = torch.zeros(count) if classes is None else torch.as_tensor(classes)
        if share.shape != (count,) or not (share > 0).all():
            raise ValueError(f"expected {count} positive weights")
        if label.shape != (count,) or label.min() < 0:
            raise ValueError(f"expected a class, 0 or more, for each of {count} components")
        share = share.double()
        return cls(share / share.sum(), centres, spread, label.long())

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    @property
    def class_count(self) -> int:
        return int(self.classes.max()) + 1

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Variances (k, d) along the components' axes (k, d, d), which are the columns."""
        values, axes = torch.linalg.eigh(self.covariances)
        return values, axes

    def log_weights(self, classes: Tensor) -> Tensor:
        """Log weights of the components within each of `classes` (batch,): (batch, k), -inf outside the class."""
        belongs = (classes[:, None] == self.classes) | (classes[:, None] == ALL)
        chosen = torch.where(belongs, self.weights.log(), -torch.inf)
        return chosen - chosen.logsumexp(1, keepdim=True)

    def log_density(self, x: Tensor, sigma: Tensor | float, classes: Tensor | int = ALL) -> Tensor:
        """Log density of x (batch, d) at level `sigma` (batch,), 0 being that of the data: (batch,), float64."""
        return self._marginal(x, sigma, classes).log_joint.logsumexp(1)

    def score(self, x: Tensor, sigma: Tensor | float, classes: Tensor | int = ALL) -> Tensor:
        """Gradient of `log_density` with respect to x: (batch, d)."""
        marginal = self._marginal(x, sigma, classes)
        return self._mean(-marginal.whitened, marginal).to(x.dtype)

    def velocity(self, x: Tensor, sigma: Tensor | float, classes: Tensor | int = ALL) -> Tensor:
        """E[noise - x0 | x] at x (batch, d), level `sigma` (batch,), within `classes` (batch,): (batch, d).

        The optimum of flow matching on this mixture, finite at every level from 0 to 1.
        """
        marginal = self._marginal(x, sigma, classes)
        variances, _ = self._eigen
        level = self._level(x, sigma)[:, None, None]
        in_eigenbasis = (level - (1 - level) * variances) * marginal.whitened
        return self._mean(in_eigenbasis, marginal, -self.means).to(x.dtype)

    def guided_velocity(self, scale: float) -> Velocity:
        """Classifier-free guidance as a velocity of conditioning {"class": (batch,)}; scale 1 is none."""

        def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            conditional = self.velocity(x, sigma, conditioning["class"])
            if scale == 1:
                return conditional
            unconditional = self.velocity(x, sigma)
            return unconditional + scale * (conditional - unconditional)

        return velocity

    def sample(self, count: int, classes: Tensor | int, generator: torch.Generator) -> Tensor:
        """`count` independent samples of `classes` (an integer, or one each): (count, d), float32."""
        probabilities = self.log_weights(_expand(classes, count)).exp()
        component = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        variances, axes = self._eigen
        noise = torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
        offset = axes[component] @ (variances[component].sqrt() * noise)[:, :, None]
        return (self.means[component] + offset[:, :, 0]).float()

    def _level(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = sigma.double() if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
        return level.expand(len(x))

    def _marginal(self, x: Tensor, sigma: Tensor | float, classes: Tensor | int) -> _Marginal:
        level = self._level(x, sigma)[:, None, None]
        variances, axes = self._eigen
        offset = x.double()[:, None] - (1 - level) * self.means
        along = torch.einsum("bki,kij->bkj", offset, axes)
        spread = (1 - level) ** 2 * variances + level**2
        exponent = (along.square() / spread + spread.log() + math.log(2 * math.pi)).sum(2) / 2
        return _Marginal(self.log_weights(_expand(classes, len(x))) - exponent, along / spread)

    def _mean(self, in_eigenbasis: Tensor, marginal: _Marginal, added: Tensor | float = 0.0) -> Tensor:
        """The posterior mean over components of vectors (batch, k, d), given in the components' eigenbases."""
        _, axes = self._eigen
        vectors = torch.einsum("bkj,kij->bki", in_eigenbasis, axes) + added
        return torch.einsum("bk,bki->bi", marginal.log_joint.softmax(1), vectors)


def _expand(classes: Tensor | int, count: int) -> Tensor:
    return torch.as_tensor(classes).expand(count)
