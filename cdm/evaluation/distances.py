"""Distances between two sets of feature vectors, as pure functions of float64 matrices (samples, features).

All of them depend on the number of samples: the Fréchet distance of two finite sets of one distribution is above 0
(about proportional to 1/n + 1/m), and the nearest-neighbour measures change with both counts and with k. Compare
figures at equal counts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of a distance matrix that are held at once."""
PAIRS = 2**25
"""Pairs of samples whose kernel is held at once: 268 MB."""


def deviation(reference: Tensor) -> Tensor:
    """Standard deviation of each feature over the reference set: (features,); 1 for a feature that never varies.

    Dividing every set by it makes distances independent of the scales of the features.
    """
    spread = reference.std(0, correction=1)
    return torch.where(spread > 1e-12 * reference.abs().amax(0).clamp(min=1e-12), spread, 1.0)


class Gaussian(NamedTuple):
    """`mean` (d,), and `factor` R (min(n, d), d) with R^T R the covariance (n - 1 in its denominator)."""

    mean: Tensor
    factor: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """The Gaussian with the moments of the set."""
    if features.shape[0] < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {features.shape[0]}")
    mean = features.mean(0)
    factor = torch.linalg.qr(features - mean, mode="r").R
    return Gaussian(mean, factor / (features.shape[0] - 1) ** 0.5)


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`. With C = R^T R the last trace is the sum of the singular
    values of R_a R_b^T: no square root of a matrix, so singular covariances (fewer samples than features) lose
    no digits.
    """
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return max(0.0, ((a.mean - b.mean).square().sum() + spread).item())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """`gaussian_distance` of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6)."""
    return gaussian_distance(fit_gaussian(a), fit_gaussian(b))


def kernel_distance(
    a: Tensor, b: Tensor, groups_a: Tensor | None = None, groups_b: Tensor | None = None
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(x.y / d + 1)^3` (KID, Bińkowski et al. 2018).

    Unlike the Fréchet distance its expectation is 0 for equal distributions at every count, so it may be negative.
    `groups` (n,): the prompt of each sample, where a set has a given number of samples of each prompt (at least 2)
    instead of independent draws; without them the estimate for such sets lies below the truth.
    """
    return (_mean_of_pairs(a, groups_a) + _mean_of_pairs(b, groups_b) - 2 * _mean_kernel(a, b)).item()


def _mean_of(kernel: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The mean of a kernel (rows, len(y)) over all pairs, some rows of `x` at a time."""
    parts = x.split(max(1, PAIRS // len(y)))
    return torch.stack([kernel(rows).mean() * (len(rows) / len(x)) for rows in parts]).sum()


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    return _mean_of(lambda rows: (rows @ y.T / x.shape[1] + 1).pow(3), x, y)


def _mean_of_pairs(x: Tensor, groups: Tensor | None) -> Tensor:
    """Unbiased mean kernel of two independent draws: pairs within a group leave out each sample with itself."""
    total = _mean_kernel(x, x)
    groups = torch.zeros(len(x)) if groups is None else groups
    for group in groups.unique():
        members = x[groups == group]
        itself = (members.square().sum(1) / x.shape[1] + 1).pow(3).mean()
        share = (len(members) / len(x)) ** 2
        total = total + share * (_mean_kernel(members, members) - itself) / (len(members) - 1)
    return total


def cmmd(a: Tensor, b: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared maximum mean discrepancy with the kernel `exp(-|x - y|^2 / (2 sigma^2))`, times `scale`.

    CMMD (Jayasumana et al. 2024) is this on unit CLIP embeddings with these constants. As there, a sample is paired
    with itself too, so that the estimate is never negative and lies above the truth by about 1/n + 1/m of it.
    """

    def mean(x: Tensor, y: Tensor) -> Tensor:
        def kernel(rows: Tensor) -> Tensor:
            squares = rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T
            return torch.exp(-squares / (2 * sigma**2))

        return _mean_of(kernel, x, y)

    return (scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b))).item()


def vendi(features: Tensor) -> float:
    """Vendi score (Friedman & Dieng 2023) with the cosine as kernel: an effective number of different samples.

    The exponential of the entropy of the eigenvalues of K / n: 1 where all features point one way, n where all are
    orthogonal. It grows with n: compare figures at equal counts only.
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    shares = torch.linalg.svdvals(unit).square() / len(features)
    return torch.exp(torch.special.entr(shares).sum()).item()


class Manifold(NamedTuple):
    """How two sets cover each other, by balls that reach to each point's k-th neighbour in its own set.

    precision, recall (Kynkäänniemi et al. 2019): the share of samples in a ball of the reference, and of the
    reference in a ball of the samples. density, coverage (Naeem et al. 2020): reference balls around a sample
    over k, on average (may exceed 1), and the share of reference balls that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of all pairs, a block of rows of `a` at a time."""
    for rows in a.split(BLOCK):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest other sample of the set: (n,)."""
    if not 1 <= k < features.shape[0]:
        raise ValueError(
            f"k must be from 1 to {features.shape[0] - 1} with {features.shape[0]} samples, not {k}"
        )
    return torch.cat(
        [d.kthvalue(k + 1, dim=1).values for d in _distances(features, features)]
    )  # the first is itself


def manifold(reference: Tensor, samples: Tensor, k: int) -> Manifold:
    """Precision, recall, density and coverage of `samples` against `reference`; balls are closed."""
    reference_radii, sample_radii = neighbour_radii(reference, k), neighbour_radii(samples, k)
    balls_around_samples = []
    nearest = torch.full_like(reference_radii, torch.inf)
    recalled = torch.zeros_like(reference_radii, dtype=torch.bool)
    for distance, radii in zip(_distances(samples, reference), sample_radii.split(BLOCK), strict=True):
        balls_around_samples.append((distance <= reference_radii).sum(1))
        nearest = torch.minimum(nearest, distance.amin(0))
        recalled |= (distance <= radii[:, None]).any(0)
    balls = torch.cat(balls_around_samples).double()
    return Manifold(
        precision=(balls > 0).double().mean().item(),
        recall=recalled.double().mean().item(),
        density=(balls / k).mean().item(),
        coverage=(nearest <= reference_radii).double().mean().item(),
    )


def diversity(features: Tensor, groups: Tensor) -> float | None:
    """Mean Euclidean distance of two different samples of one group (one prompt), averaged over groups.

    `groups`: (n,) integers. None where no group has two samples.
    """
    means = []
    for group in groups.unique():
        members = features[groups == group]
        if len(members) > 1:
            means.append(torch.pdist(members).mean())
    return torch.stack(means).mean().item() if means else None
