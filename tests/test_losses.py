"""The loss terms against values worked by hand and the released code's, and where their gradients go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdm import losses
from cdm.flow import velocity_to_x0


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    """Inputs, losses and gradients recorded from the authors' released code; `about` in the file explains its keys."""
    case = json.loads((Path(__file__).parent / "parity.json").read_text())
    return {name: torch.tensor(value) for name, value in case.items() if name != "about"}


@pytest.mark.parametrize("term", ["ca", "dm"])
def test_terms_and_gradients_are_those_of_the_released_code(released: dict[str, Tensor], term: str):
    v_student = released["v_student"].clone().requires_grad_()
    x0 = velocity_to_x0(released["xt"], v_student, released["sigma"])
    x0_cond, x0_uncond, x0_fake = (
        velocity_to_x0(released["xt_teacher"], released[name], released["tau"])
        for name in ("v_cond", "v_uncond", "v_fake")
    )
    if term == "ca":
        direction = losses.guidance_direction(x0, x0_cond, x0_uncond, float(released["scale"]))
    else:
        direction = losses.matching_direction(x0, x0_cond, x0_fake)
    loss = losses.direction_loss(x0, direction)
    loss.backward()
    torch.testing.assert_close(loss.detach(), released[term], rtol=5e-7, atol=0)
    torch.testing.assert_close(v_student.grad, released[f"{term}_grad"], rtol=1e-5, atol=5e-8)


def test_fake_score_loss_is_that_of_the_released_code(released: dict[str, Tensor]):
    loss = losses.fake_score_loss(released["v_fake"], released["xt"], released["xt_teacher"])
    torch.testing.assert_close(loss, released["fake"], rtol=5e-7, atol=0)


def test_guidance_direction_by_hand():
    student = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    cond = torch.tensor([[2.0, 1.0], [0.01, -0.01]])
    uncond = torch.tensor([[1.0, 1.5], [0.0, 0.0]])
    direction = losses.guidance_direction(student, cond, uncond, scale=2.0)
    # first sample: mean|cond - student| = 1.5; second: 0.01, floored at 0.1
    expected = torch.tensor([[2 * 1 / 1.5, 2 * -0.5 / 1.5], [2 * 0.01 / 0.1, 2 * -0.01 / 0.1]])
    torch.testing.assert_close(direction, expected)


def test_matching_direction_by_hand():
    student, real, fake = torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.5]])
    torch.testing.assert_close(
        losses.matching_direction(student, real, fake), torch.tensor([[1 / 3.0, -1.5 / 3.0]])
    )


def test_norm_is_taken_sample_by_sample():
    student, real, fake = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    real[1] *= 10
    direction = losses.matching_direction(student, real, fake)
    torch.testing.assert_close(direction, torch.ones_like(direction))


def test_direction_that_is_not_finite_counts_as_zero():
    student, fake = torch.zeros(2, 2), torch.zeros(2, 2)
    real = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    direction = losses.matching_direction(student, real, fake)
    assert torch.equal(direction[0], torch.zeros(2))
    assert torch.equal(direction[1], torch.ones(2))


def test_direction_loss_value_and_gradient():
    student = torch.tensor([[1.0, 2.0]], requires_grad=True)
    direction = torch.tensor([[0.5, -1.0]])
    loss = losses.direction_loss(student, direction)
    assert loss.item() == (0.25 + 1.0) / 2
    loss.backward()
    torch.testing.assert_close(student.grad, -2 * direction / 2)


def test_directions_carry_no_gradient():
    inputs = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    assert not losses.matching_direction(*inputs).requires_grad
    assert not losses.guidance_direction(*inputs, scale=1.0).requires_grad


def test_fake_score_loss_by_hand_and_without_gradient_to_the_data():
    velocity = torch.tensor([[1.0, 0.0]], requires_grad=True)
    x0 = torch.tensor([[0.0, 2.0]], requires_grad=True)
    noise = torch.tensor([[2.0, 1.0]])
    loss = losses.fake_score_loss(velocity, x0, noise)
    assert loss.item() == (1.0 + 1.0) / 2
    loss.backward()
    assert x0.grad is None
    torch.testing.assert_close(velocity.grad, torch.tensor([[-1.0, 1.0]]))


def test_losses_are_float32_for_half_precision_inputs():
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    assert losses.direction_loss(half, losses.matching_direction(half, half + 1, half)).dtype == torch.float32
    assert losses.fake_score_loss(half, half, half).dtype == torch.float32
