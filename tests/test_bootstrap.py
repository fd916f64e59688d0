"""Errors over the prompts: against the standard error of a mean, which is known."""

from __future__ import annotations

import pytest
import torch

from cdm.evaluation.bootstrap import NORMAL, Estimate, Resampling, jackknife

VALUES = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ERROR = VALUES.std(correction=0).item() / 40**0.5


def mean_of(prompts: torch.Tensor | None) -> dict[str, float]:
    return {"mean": (VALUES if prompts is None else VALUES[prompts]).mean().item()}


def test_both_kinds_of_resamples_have_the_error_of_a_mean() -> None:
    resampling = Resampling(40, 2000, seed=3)
    for estimate in (resampling.mean(VALUES), resampling.of_sets(mean_of)["mean"]):
        assert estimate.value == pytest.approx(VALUES.mean().item())
        assert estimate.interval is not None
        low, high = estimate.interval
        assert (low + high) / 2 == pytest.approx(estimate.value)
        assert (high - low) / 2 / NORMAL == pytest.approx(ERROR, rel=0.06)


def test_an_odd_number_of_prompts_has_no_other_error() -> None:
    """Halves of 9 prompts hold 4: the error of their means, 1/4 - 1/9, is brought to 1/9."""
    values = VALUES[:9]
    found = Resampling(9, 4000, seed=0).of_sets(
        lambda prompts: {"mean": (values if prompts is None else values[prompts]).mean().item()}
    )["mean"]
    assert found.replicates.std().item() == pytest.approx(values.std().item() / 3, rel=0.06)


def test_halves_hold_a_prompt_once() -> None:
    seen = []
    Resampling(11, 20, seed=0).of_sets(lambda prompts: {"x": 0.0 if seen.append(prompts) else 1.0})
    assert seen[0] is None
    assert all(len(half) == len(half.unique()) == 5 for half in seen[1:])
    assert len({tuple(half.tolist()) for half in seen[1:]}) > 15


def test_differences_are_paired() -> None:
    """What both sets share drops out of the error of their difference."""
    resampling = Resampling(40, 500, seed=1)
    shifted = resampling.mean(VALUES + 0.25).minus(resampling.mean(VALUES))
    assert shifted.value == pytest.approx(0.25)
    assert shifted.interval == pytest.approx((0.25, 0.25), abs=1e-9)


def test_what_is_not_known_is_not_said() -> None:
    for prompts, count in ((7, 100), (40, 0)):
        resampling = Resampling(prompts, count, seed=0)
        assert resampling.mean(VALUES[:prompts]).interval is None
        assert resampling.of_sets(mean_of)["mean"].interval is None
    known = Resampling(40, 50, seed=0).mean(VALUES)
    unknown = Estimate(1.0, torch.empty(0))
    assert known.minus(unknown).interval is None
    assert unknown.minus(known).value == pytest.approx(1 - known.value)


def test_the_same_seed_gives_the_same_replicates() -> None:
    one, other = (Resampling(40, 20, seed=5).mean(VALUES).replicates for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, Resampling(40, 20, seed=6).mean(VALUES).replicates)


def test_the_jackknife_of_a_mean_has_the_textbook_error() -> None:
    estimate = jackknife(lambda rows: VALUES[rows].mean().item(), torch.arange(40))
    assert estimate.value == pytest.approx(VALUES.mean().item())
    assert estimate.error == pytest.approx(VALUES.std().item() / 40**0.5, rel=1e-12)


def test_the_jackknife_leaves_out_whole_blocks() -> None:
    block_means = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    values = block_means.repeat(50)  # 50 equal samples a block are one observation
    estimate = jackknife(lambda rows: values[rows].mean().item(), torch.arange(200) % 4)
    assert estimate.error == pytest.approx(block_means.std().item() / 2, rel=1e-12)
    assert jackknife(lambda rows: 0.0, torch.arange(3)).error is None


def test_a_difference_of_jackknives_is_paired() -> None:
    """Two figures of the same samples: what both have in common is no error of their difference."""
    other = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = (
        jackknife(lambda rows, values=values: values[rows].mean().item(), torch.arange(40))
        for values in (VALUES, VALUES + 0.01 * other)
    )
    assert two.minus(one).error == pytest.approx(0.01 * other.std().item() / 40**0.5, rel=1e-9)
