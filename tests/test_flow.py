"""Flow-matching arithmetic against closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cdm import flow
from reference.gaussian import optimal_velocity


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 4, 3, generator=generator, dtype=torch.float64)
    return x0, noise, torch.rand(count, generator=generator, dtype=torch.float64)


def test_converters_round_trip():
    x0, noise, sigma = batch()
    x, velocity = flow.add_noise(x0, noise, sigma), noise - x0
    torch.testing.assert_close(flow.velocity_to_x0(x, velocity, sigma), x0)
    torch.testing.assert_close(flow.velocity_to_noise(x, velocity, sigma), noise)


def test_ends_are_data_and_noise():
    x0, noise, _ = batch()
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(5)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.ones(5)), noise)


def test_euler_step_is_exact_on_a_straight_path_both_ways():
    x0, noise, sigma = batch()
    x, velocity = flow.add_noise(x0, noise, sigma), noise - x0
    for target in (torch.zeros_like(sigma), torch.ones_like(sigma)):
        torch.testing.assert_close(
            flow.euler_step(x, velocity, sigma, target), flow.add_noise(x0, noise, target)
        )


def test_sigma_must_be_one_level_a_sample():
    x0, noise, _ = batch()
    with pytest.raises(ValueError, match="one level a sample"):
        flow.add_noise(x0, noise, torch.ones(4))


def test_shift_keeps_the_ends_and_inverts():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    shifted = flow.shift_sigmas(sigmas, 3.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(flow.unshift_sigmas(shifted, 3.0), sigmas)


def test_inference_sigmas():
    torch.testing.assert_close(flow.inference_sigmas(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(flow.inference_sigmas(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5]))
    assert flow.inference_sigmas(1, 3.0).tolist() == [1.0]
    with pytest.raises(ValueError, match="at least 1"):
        flow.inference_sigmas(0, 3.0)


def test_euler_converges_at_first_order_to_the_exact_gaussian_flow():
    """For N(mean, d^2) the flow maps noise z to mean + d z exactly; the error must halve with the step."""
    mean, deviation = torch.tensor(2.0, dtype=torch.float64), 0.5
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (32, 64, 128):
        x = z.clone()
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        for sigma, after in pairwise(levels):
            sigma, after = sigma.expand(9), after.expand(9)
            x = flow.euler_step(x, optimal_velocity(x, sigma, mean, deviation), sigma, after)
        errors.append((x - (mean + deviation * z)).abs().max())
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2
