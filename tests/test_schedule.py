"""Schedules: their levels, their distribution, and where rollouts stop."""

from __future__ import annotations

import pytest
import torch

from cdm.params import Schedule
from cdm.randomness import Draws
from cdm.schedule import draw_rollouts, dynamic_schedule, off_trajectory_levels

DYNAMIC = Schedule(kind="dynamic", min_len=1, max_len=6, sigma_min=0.1, sigma_max=0.9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("spacing", ["stratified", "independent"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_levels_fall_from_one_within_the_range(length: int, spacing: str):
    levels = dynamic_schedule(length, 0.25, 0.95, spacing, generator())
    assert levels.shape == (length,)
    assert levels.dtype == torch.float32
    assert levels[0] == 1.0
    assert (levels.diff() < 0).all()
    assert ((levels[1:] >= 0.25) & (levels[1:] <= 0.95)).all()


def test_stratified_levels_have_one_in_each_bin_and_independent_ones_do_not():
    def bins(spacing: str, seed: int) -> list[int]:
        inner = dynamic_schedule(9, 0.2, 1.0, spacing, generator(seed))[1:]
        return ((inner - 0.2) / 0.8 * 8).long().clamp(max=7).sort().values.tolist()

    assert all(bins("stratified", seed) == list(range(8)) for seed in range(20))
    assert any(bins("independent", seed) != list(range(8)) for seed in range(20))


def test_inner_levels_are_uniform_over_the_range():
    inner = torch.cat([dynamic_schedule(5, 0.2, 0.8, "stratified", generator(s))[1:] for s in range(2000)])
    assert abs(inner.mean() - 0.5) < 0.01
    assert abs(inner.std() - 0.6 / 12**0.5) < 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.1, 0.9, "stratified"), "length"),
        ((3, 0.9, 0.1, "stratified"), "sigma_min"),
        ((3, 0.1, 0.9, "even"), "spacing"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        dynamic_schedule(*arguments, generator())


def test_rollouts_stop_uniformly_on_schedules_of_uniform_length():
    rollouts = draw_rollouts(DYNAMIC, 1.0, Draws(0, 0, range(6000)))
    lengths = (rollouts.sigmas > 0).sum(1)
    depth = torch.tensor(rollouts.depth)
    assert (depth < lengths).all()
    counts = lengths.bincount(minlength=7)[1:] / 6000
    assert (counts - 1 / 6).abs().max() < 0.02
    assert ((depth[lengths == 4].bincount(minlength=4) / counts[3] / 6000) - 0.25).abs().max() < 0.05
    assert abs(depth.float().mean() - 1.25) < 0.05  # mean of (N - 1) / 2
    assert torch.equal(rollouts.anchor_sigma, rollouts.sigmas[torch.arange(6000), depth])


def test_rollouts_are_shifted_and_belong_to_their_sample():
    plain, shifted = (draw_rollouts(DYNAMIC, shift, Draws(0, 5, range(8))) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted.sigmas, 3 * plain.sigmas / (1 + 2 * plain.sigmas))
    assert shifted.depth == plain.depth
    half = draw_rollouts(DYNAMIC, 1.0, Draws(0, 5, range(4, 8)))
    assert half.depth == plain.depth[4:]
    width = half.sigmas.shape[1]
    assert torch.equal(half.sigmas, plain.sigmas[4:, :width])


def test_fixed_schedule():
    fixed = DYNAMIC.model_copy(update={"kind": "fixed", "sigmas": [1.0, 0.5]})
    rollouts = draw_rollouts(fixed, 3.0, Draws(0, 0, range(50)))
    torch.testing.assert_close(rollouts.sigmas, torch.tensor([[1.0, 0.75]]).expand(50, 2))
    assert set(rollouts.depth) == {0, 1}


def test_off_trajectory_levels_span_the_range():
    uniform, limits = torch.tensor([0.0, 0.5, 1.0]), (0.3, 0.6)
    torch.testing.assert_close(off_trajectory_levels(DYNAMIC, uniform, limits), torch.tensor([0.1, 0.5, 0.9]))
    narrow = DYNAMIC.model_copy(update={"off_range": (0.35, 0.45)})
    torch.testing.assert_close(off_trajectory_levels(narrow, uniform, limits), torch.tensor([0.35, 0.4, 0.45]))


def test_off_trajectory_levels_of_a_range_of_their_own_end_at_the_limits():
    """As released: U(0, 1), clamped. What lies outside is at a limit, and not drawn again."""
    released = DYNAMIC.model_copy(update={"off_range": (0.0, 1.0)})
    levels = off_trajectory_levels(released, torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]), (0.02, 0.98))
    torch.testing.assert_close(levels, torch.tensor([0.02, 0.02, 0.5, 0.98, 0.98]))


def test_the_next_level_is_where_a_sample_steps_to():
    rollouts = draw_rollouts(DYNAMIC, 2.0, Draws(0, 0, range(50)))
    for row, depth in enumerate(rollouts.depth):
        levels = [level for level in rollouts.sigmas[row].tolist() if level > 0] + [0.0]
        assert float(rollouts.next_sigma[row]) == levels[depth + 1]
