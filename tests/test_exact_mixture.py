"""The exact mixture against independent computations: autograd, Monte Carlo, and where its flow ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from cdm.flow import inference_sigmas
from cdm.rollout import integrate
from exact.mixture import ALL, Mixture

MIXTURE = Mixture.from_components(
    means=[[-1.5, 0.5], [0.2, -1.0], [1.5, 1.0], [0.0, 2.0]],
    spreads=torch.tensor(
        [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0], [0, 0.1]], [[0.5, -0.3], [-0.3, 0.3]], [[0.05, 0], [0, 0.4]]]
    ),
    classes=[0, 0, 1, 1],
    weights=[1, 2, 3, 2],
)
LEVELS = [0.05, 0.3, 0.7, 0.95]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(sigma: float, members: list[int]) -> MixtureSameFamily:
    """The density at a level, by torch's own distributions."""
    noise = sigma**2 * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(MIXTURE.weights[members]),
        MultivariateNormal(
            (1 - sigma) * MIXTURE.means[members], (1 - sigma) ** 2 * MIXTURE.covariances[members] + noise
        ),
    )


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize(("label", "members"), [(ALL, [0, 1, 2, 3]), (0, [0, 1]), (1, [2, 3])])
def test_density_score_and_velocity_are_those_of_the_density(
    sigma: float, label: int, members: list[int]
) -> None:
    x = (2 * torch.randn(50, 2, generator=generator(), dtype=torch.float64)).requires_grad_()
    log_density = reference(sigma, members).log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    torch.testing.assert_close(MIXTURE.log_density(x, sigma, label), log_density.detach())
    torch.testing.assert_close(MIXTURE.score(x, sigma, label), score)
    # Tweedie: E[noise | x] = -sigma * score, and noise - x0 = (noise - x) / (1 - sigma).
    expected = (-sigma * score - x) / (1 - sigma)
    torch.testing.assert_close(MIXTURE.velocity(x, sigma, label), expected)


@pytest.mark.parametrize("sigma", LEVELS[1:])
def test_velocity_is_a_conditional_expectation(sigma: float) -> None:
    """Data and noise drawn, and weighted by how well they explain x."""
    x0 = MIXTURE.sample(400_000, 1, generator()).double()
    x = torch.tensor([[0.3, 0.4], [1.0, 0.6], [-0.5, 0.2]], dtype=torch.float64)
    noise = (x[:, None] - (1 - sigma) * x0) / sigma
    weight = torch.softmax(-noise.square().sum(2) / 2, dim=1)[:, :, None]
    expected = (weight * (noise - x0)).sum(1)
    torch.testing.assert_close(MIXTURE.velocity(x, sigma, 1), expected, atol=0.03, rtol=0.01)


def test_each_sample_has_its_own_level_and_class() -> None:
    x = torch.randn(6, 2, generator=generator())
    sigma, classes = torch.tensor([0.1, 0.9, 0.5, 0.3, 1.0, 0.0]), torch.tensor([0, 1, ALL, 1, 0, ALL])
    rows = [MIXTURE.velocity(x[i : i + 1], float(sigma[i]), int(classes[i])) for i in range(6)]
    torch.testing.assert_close(MIXTURE.velocity(x, sigma, classes), torch.cat(rows))


def test_velocity_at_the_ends() -> None:
    """At level 1 nothing is known of the data but their mean; at level 0 they are known, and no noise is."""
    x = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    mean = MIXTURE.weights[:2] @ MIXTURE.means[:2] / MIXTURE.weights[:2].sum()
    torch.testing.assert_close(MIXTURE.velocity(x, 1.0, 0), x - mean)
    torch.testing.assert_close(MIXTURE.velocity(x, 0.0, 0), -x)


def test_far_away_it_stays_finite_and_points_back() -> None:
    x = torch.tensor([[300.0, 0.0], [0.0, -300.0]])
    for sigma in (1e-3, 0.5):
        assert MIXTURE.velocity(x, sigma).isfinite().all()
        assert (MIXTURE.score(x, sigma) * x).sum(1).max() < 0


def test_samples_have_the_moments_of_their_class() -> None:
    x = MIXTURE.sample(200_000, 1, generator()).double()
    share, means = MIXTURE.weights[2:] / MIXTURE.weights[2:].sum(), MIXTURE.means[2:]
    mean = share @ means
    outer = (means - mean)[:, :, None] * (means - mean)[:, None]
    covariance = (share[:, None, None] * (MIXTURE.covariances[2:] + outer)).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.02, rtol=0)


def flow(mixture: Mixture, noise: Tensor, classes: Tensor, steps: int) -> Tensor:
    """Euler's solution of the mixture's ODE, from noise to data."""
    return integrate(mixture.guided_velocity(1), noise, {"class": classes}, inference_sigmas(steps, shift=1.0))


def test_the_flow_of_one_gaussian_is_the_known_linear_map() -> None:
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    gaussian = Mixture.from_components([[1.0, -2.0]], covariance[None])
    noise = torch.randn(20, 2, generator=generator(), dtype=torch.float64)
    values, axes = torch.linalg.eigh(covariance)
    expected = gaussian.means + noise @ (axes * values.sqrt()) @ axes.T
    classes = torch.zeros(20, dtype=torch.long)
    coarse, fine = (flow(gaussian, noise, classes, steps) - expected for steps in (200, 400))
    assert fine.abs().max() < 0.01
    # Euler's method is of first order.
    torch.testing.assert_close(coarse / 2, fine, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("label", [ALL, 1])
def test_the_flow_ends_in_the_mixture(label: int) -> None:
    """Each component gets its weight of the noise and, within it, its moments."""
    count = 20_000
    noise = torch.randn(count, 2, generator=generator(1))
    ends = flow(MIXTURE, noise, torch.full((count,), label), steps=150).double()
    truth = MIXTURE.sample(count, label, generator(2)).double()
    torch.testing.assert_close(ends.mean(0), truth.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(ends.T.cov(), truth.T.cov(), atol=0.05, rtol=0)
    entropy = [MIXTURE.log_density(x, 0.0, label).mean() for x in (ends, truth)]
    torch.testing.assert_close(*entropy, atol=0.03, rtol=0)


def test_guidance_adds_to_what_a_class_differs_from_all() -> None:
    x, sigma, classes = (
        torch.randn(4, 2, generator=generator()),
        torch.full((4,), 0.6),
        torch.tensor([0, 1, 0, 1]),
    )
    conditional, unconditional = MIXTURE.velocity(x, sigma, classes), MIXTURE.velocity(x, sigma)
    guided = MIXTURE.guided_velocity(3.0)(x, sigma, {"class": classes})
    torch.testing.assert_close(guided, conditional + 2 * (conditional - unconditional))
    torch.testing.assert_close(MIXTURE.guided_velocity(1.0)(x, sigma, {"class": classes}), conditional)


@pytest.mark.parametrize(
    "parts",
    [
        {"means": [[0.0, 0.0]], "spreads": 0.0},
        {"means": [[0.0, 0.0]], "spreads": torch.eye(3)[None]},
        {"means": [[0.0, 0.0]], "spreads": 1.0, "classes": [-1]},
        {"means": [[0.0, 0.0]], "spreads": 1.0, "weights": [0.0]},
        {"means": [[0.0, 0.0]], "spreads": 1.0, "weights": [0.5, 0.5]},
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        Mixture.from_components(**parts)
