"""Distances between feature sets, against closed forms and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch

from cdm.evaluation.distances import (
    cmmd,
    deviation,
    diversity,
    frechet_distance,
    kernel_distance,
    manifold,
    neighbour_radii,
    vendi,
)


def draw(seed: int, count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(samples: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """`samples` moved so that their mean is exactly `mean` and their covariance exactly root @ root."""
    centred = samples - samples.mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / (len(samples) - 1))
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T @ root + mean


def symmetric(seed: int, width: int) -> torch.Tensor:
    square = draw(seed, width, width)
    return square @ square.T / width + 0.1 * torch.eye(width, dtype=torch.float64)


def matrix_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def test_frechet_of_diagonal_gaussians_is_the_sum_over_features() -> None:
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    root_a, root_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double()
    a = with_moments(draw(0, 50, 3), mean_a, root_a.diag())
    b = with_moments(draw(1, 70, 3), mean_b, root_b.diag())
    # (1 + 9 + 0) for the means, (1 + 2.25 + 0) for the deviations
    assert frechet_distance(a, b) == pytest.approx(13.25, rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    root_a, root_b = symmetric(2, 5), symmetric(3, 5)
    zero = torch.zeros(5, dtype=torch.float64)
    a, b = with_moments(draw(4, 60, 5), zero, root_a), with_moments(draw(5, 40, 5), zero, root_b)
    between = matrix_root(root_a @ (root_b @ root_b) @ root_a)
    expected = (root_a @ root_a + root_b @ root_b - 2 * between).trace().item()
    assert not torch.allclose(root_a @ root_b, root_b @ root_a)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_a_set_with_itself_is_zero_also_with_fewer_samples_than_features() -> None:
    few = 100 * draw(6, 10, 64)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 2) == pytest.approx(64 * 4, rel=1e-12)
    assert frechet_distance(few[:, :1].expand(-1, 64), few) > 0


def test_frechet_is_the_variance_where_the_other_set_is_a_point() -> None:
    a, point = draw(7, 30, 4), torch.zeros(5, 4, dtype=torch.float64)
    assert frechet_distance(a, point) == pytest.approx((a.mean(0).square().sum() + a.var(0).sum()).item())


def test_frechet_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(draw(0, 1, 3), draw(1, 5, 3))


def test_kernel_distance_by_hand() -> None:
    a, b = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[2.0], [-1.0]]).double()
    # k(0, 1) = 1; k(2, -1) = (-1)^3 = -1; k between the sets: 1, 1, 27, 0
    assert kernel_distance(a, b) == pytest.approx(1 - 1 - 2 * 29 / 4)


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(draw(10 + i, 20, 3), draw(500 + i, 30, 3)) for i in range(300)]
    mean, error = torch.tensor(values).mean().item(), torch.tensor(values).std().item() / math.sqrt(300)
    assert abs(mean) < 3 * error
    assert min(values) < 0


def test_kernel_distance_is_unbiased_for_fixed_numbers_of_each_prompt() -> None:
    groups_a, groups_b = torch.arange(24) % 6, torch.arange(30) % 6
    means = 3 * draw(20, 6, 3)  # prompts far apart
    plain, grouped = [], []
    for i in range(300):
        a, b = draw(1000 + i, 24, 3) + means[groups_a], draw(2000 + i, 30, 3) + means[groups_b]
        plain.append(kernel_distance(a, b))
        grouped.append(kernel_distance(a, b, groups_a, groups_b))
    values = torch.tensor([plain, grouped])
    error = values.std(1) / math.sqrt(300)
    assert abs(values[1].mean()) < 3 * error[1]
    assert values[0].mean() < -10 * error[0]  # what the plain estimate would say


LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0]]).double()


def test_neighbour_radii_leave_out_the_sample_itself() -> None:
    assert neighbour_radii(LINE, 1).tolist() == [1, 1, 1, 8]
    assert neighbour_radii(LINE, 2).tolist() == [2, 1, 2, 9]
    assert neighbour_radii(torch.zeros(3, 2).double(), 2).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="k must be"):
        neighbour_radii(LINE, 4)


def test_manifold_by_hand() -> None:
    samples = torch.tensor([[0.5], [1.5], [50.0], [60.0]]).double()
    # Reference balls: [-1, 1], [0, 2], [1, 3], [2, 18]. 0.5 is in two of them, 1.5 in two, 50 and 60 in none.
    # Sample balls: [-.5, 1.5], [.5, 2.5], [40, 60], [50, 70]: they hold 0, 1 and 2, not 10.
    assert manifold(LINE, samples, 1) == (0.5, 0.75, 1.0, 0.75)


def test_manifold_of_a_set_with_itself_and_of_one_far_away() -> None:
    a = draw(8, 40, 3)
    same, far = manifold(a, a, 3), manifold(a, a + 100, 3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density >= 1  # each sample is in its own ball and in its neighbours'
    assert far == (0, 0, 0, 0)


def test_manifold_sees_a_dropped_mode_as_lost_recall_and_coverage() -> None:
    modes = torch.tensor([[0.0], [100.0]]).double()
    reference = torch.cat([draw(9, 50, 2) + modes[0], draw(10, 50, 2) + modes[1]])
    found = manifold(reference, draw(11, 100, 2), 5)
    assert found.precision > 0.9
    assert 0.4 < found.recall <= 0.5
    assert 0.3 < found.coverage <= 0.5


def test_blocks_of_the_distance_matrix_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = draw(12, 37, 4), draw(13, 29, 4) + 0.5
    whole = manifold(reference, samples, 3)
    monkeypatch.setattr("cdm.evaluation.distances.BLOCK", 8)
    assert manifold(reference, samples, 3) == whole


def test_diversity_is_the_mean_over_groups_of_the_mean_distance_of_pairs() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [0, 0], [1, 0], [0, 0], [7, 7]]).double()
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    # group 0: 5; group 1: (1 + 0 + 1) / 3; group 2 has no pair
    assert diversity(features, groups) == pytest.approx((5 + 2 / 3) / 2)
    assert diversity(features, torch.arange(6)) is None


def test_deviation_is_one_for_constant_features() -> None:
    features = torch.tensor([[0.0, 1e6, 0.1], [2.0, 1e6, 0.1]]).double()
    assert deviation(features).tolist() == pytest.approx([math.sqrt(2), 1, 1])


def test_cmmd_of_gaussians_has_its_closed_form() -> None:
    """N(0, 1) against N(3, 1) in one dimension, kernel width 2: E k = w / sqrt(w^2 + 2) exp(-d^2 / (2 (w^2 + 2)))."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    b = torch.randn(1000, 1, generator=generator, dtype=torch.float64) + 3
    expected = 2 * 2 / 6**0.5 * (1 - math.exp(-9 / 12))
    assert cmmd(a, b, sigma=2.0, scale=1.0) == pytest.approx(expected, rel=0.06)


def test_cmmd_by_hand_with_the_published_constants() -> None:
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert cmmd(a, b) == pytest.approx(1000 * 2 * (1 - math.exp(-2 / 200)), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_vendi_counts_different_samples() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert vendi(eye) == pytest.approx(6)
    assert vendi(5 * eye) == pytest.approx(6)  # only directions count
    assert vendi(eye[:1].expand(6, -1)) == pytest.approx(1)
    assert vendi(eye[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2)
    shares = torch.tensor([4 / 6, 2 / 6])
    assert vendi(eye[[0, 0, 0, 0, 1, 1]]) == pytest.approx(
        torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-6
    )
