"""Truncated backward simulation against the full one."""

from __future__ import annotations

import torch

from cdm.flow import euler_step, inference_sigmas
from cdm.rollout import integrate, simulate
from cdm.schedule import Rollouts
from reference.gaussian import optimal_velocity

SIGMAS = torch.tensor([[1.0, 0.8, 0.5, 0.2], [1.0, 0.6, 0.0, 0.0], [1.0, 0.7, 0.3, 0.0], [1.0, 0.9, 0.4, 0.1]])


class Recorder:
    """An exact Gaussian velocity that remembers how many samples each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        self.calls.append(len(x))
        return optimal_velocity(x, sigma, conditioning["mean"], 0.5)


def full_rollout(noise: torch.Tensor, mean: torch.Tensor) -> list[torch.Tensor]:
    """Every state of every sample."""
    states = [noise]
    for step in range(3):
        x, sigma = states[-1], SIGMAS[:, step]
        velocity = optimal_velocity(x, sigma.clamp(min=1e-3), mean, 0.5)
        states.append(euler_step(x, velocity, sigma, SIGMAS[:, step + 1]))
    return states


def test_truncated_rollout_equals_the_full_one_and_runs_only_what_still_moves():
    noise, mean = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4.0)
    mean = mean.reshape(4, 1, 1).expand(4, 2, 3)
    states = full_rollout(noise, mean)
    velocity = Recorder()
    depth = [1, 0, 2, 3]
    anchors = simulate(velocity, noise, {"mean": mean}, Rollouts(SIGMAS, depth))
    for row, steps in enumerate(depth):
        torch.testing.assert_close(anchors[row], states[steps][row])
    assert velocity.calls == [3, 2, 1]
    assert torch.equal(anchors[1], noise[1])


def test_noise_is_left_as_it_was_and_no_graph_is_kept():
    noise = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    before = noise.clone()
    weight = torch.ones(1, requires_grad=True)
    anchors = simulate(lambda x, s, c: x * weight, noise, {}, Rollouts(SIGMAS, [1, 1, 1, 1]))
    assert torch.equal(noise, before)
    assert not anchors.requires_grad


def test_nobody_moves_when_every_anchor_is_the_noise():
    velocity, noise = Recorder(), torch.randn(4, 1)
    assert torch.equal(simulate(velocity, noise, {"mean": noise}, Rollouts(SIGMAS, [0] * 4)), noise)
    assert velocity.calls == []


def test_more_calls_than_steps_change_nothing():
    """Where another process goes deeper, and both must call a sharded network equally often."""
    velocity, noise = Recorder(), torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    rollouts = Rollouts(SIGMAS, [1, 0, 2, 1])
    expected = simulate(Recorder(), noise, {"mean": noise}, rollouts)
    assert torch.equal(simulate(velocity, noise, {"mean": noise}, rollouts, calls=5), expected)
    assert velocity.calls == [3, 1, 1, 1, 1]
    assert torch.equal(simulate(velocity, noise, {"mean": noise}, Rollouts(SIGMAS, [0] * 4), calls=2), noise)


def test_integrate_ends_in_data():
    """One step of the exact Gaussian velocity from noise lands on the mean; many land on mean + deviation * z."""
    noise = torch.linspace(-1, 1, 5).unsqueeze(1)
    mean = torch.full((5, 1), 2.0)
    one = integrate(Recorder(), noise, {"mean": mean}, inference_sigmas(1, 1.0))
    torch.testing.assert_close(one, mean)
    many = integrate(Recorder(), noise, {"mean": mean}, inference_sigmas(2000, 1.0))
    torch.testing.assert_close(many, mean + 0.5 * noise, atol=2e-3, rtol=0)
