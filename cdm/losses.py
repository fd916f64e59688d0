"""The terms of the student's loss, and the fake score's, in x0 space and float32.

Each student term is a *direction*, a detached displacement of the student's x0, and `direction_loss` turns it
into a loss whose gradient is -2 * direction / size. Tensors are (batch, ...); norms are taken sample by sample.
Guidance and matching are those of CDM (sections 3.2 and 3.3); other functions name their papers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm.flow import expand, renoise_coefficients


def guided(x0_cond: Tensor, x0_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `x0_uncond + scale * (x0_cond - x0_uncond)`."""
    return x0_uncond + scale * (x0_cond - x0_uncond)


def _normalised(direction: Tensor, x0_student: Tensor, x0_real: Tensor, min_norm: float) -> Tensor:
    """`direction` over each sample's mean distance between student and teacher; 0 where that is not finite."""
    distance = (x0_real.float() - x0_student.float()).abs().flatten(1).mean(1).clamp(min=min_norm)
    scaled = direction / distance.reshape(-1, *[1] * (direction.ndim - 1))
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).detach()


def guidance_direction(
    x0_student: Tensor, x0_cond: Tensor, x0_uncond: Tensor, scale: float | Tensor, min_norm: float = 0.1
) -> Tensor:
    """CFG augmentation (CA): `scale * (x0_cond - x0_uncond) / max(mean|x0_cond - x0_student|, min_norm)`.

    `x0_cond` and `x0_uncond` are the teacher's predictions with the prompt and with the empty one; `scale` is one
    number, or one a sample (batch, 1, ...).
    """
    direction = scale * (x0_cond.float() - x0_uncond.float())
    return _normalised(direction, x0_student, x0_cond, min_norm)


def matching_direction(x0_student: Tensor, x0_real: Tensor, x0_fake: Tensor, min_norm: float = 0.1) -> Tensor:
    """Distribution matching (DM): `(x0_real - x0_fake) / max(mean|x0_real - x0_student|, min_norm)`.

    `x0_real` is the teacher's prediction, `x0_fake` the fake score's, at the same re-noised point. With a guided
    teacher it is the gradient of DMD (arXiv 2311.18828, section 3.2) and DMD2 (2405.14867).
    """
    return _normalised(x0_real.float() - x0_fake.float(), x0_student, x0_real, min_norm)


def score_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, tau: Tensor, regulariser: float) -> Tensor:
    """Score-gradient matching (SGMD, arXiv 2605.30116): the gradient of its objective in the fake score's prediction.

    `(x0_fake - x0_real) / N - regulariser * (x0_fake - x0) / tau` with `N = mean|x0_real - x0|`: the squared
    difference of the scores, less the fake score's own error, which averages out where the fake score has
    learnt the student. All of it goes on, through the fake score's input, to the student: `(1 - tau)` times
    what arrives there is the gradient in `x0`, and `-1/2` of that its direction. Here 1 / N, as in the other
    terms, takes the place of the paper's weight over tau.
    """
    distance = (x0_real - x0).abs().flatten(1).mean(1) + 1e-8
    fisher = (x0_fake - x0_real) / expand(distance, x0)
    gradient = fisher - regulariser * (x0_fake - x0) / expand(tau, x0)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0).detach()


def direction_loss(x0_student: Tensor, direction: Tensor) -> Tensor:
    """`mean((x0_student - stopgrad(x0_student + direction))^2)`: a scalar whose gradient follows `direction`."""
    x0 = x0_student.float()
    return F.mse_loss(x0, (x0 + direction).detach())


def fake_score_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow matching of the fake score on the student's data: `mean((velocity - (noise - x0))^2)`, a scalar."""
    return F.mse_loss(velocity.float(), (noise - x0).float().detach())


def state_score_loss(velocity: Tensor, x: Tensor, noise: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
    """Score matching on states `x` of level `sigma`, not data, re-noised to `tau` (Phased DMD, arXiv 2510.27684).

    The score of `A x + B noise` is learnt without bias only from `-noise / B`. As a velocity, which is
    `-(x_tau + tau * score) / (1 - tau)`, that is `(tau + (1 - tau) sigma^2 / (1 - sigma)^2) / B * noise
    - x / (1 - sigma)`; it is `noise - x0` where sigma is 0, but `noise - x` elsewhere is biased. Errors are weighted
    by `min(1 / B^2, 10)`.
    """
    s, t = expand(sigma, x), expand(tau, x)
    _, spread = renoise_coefficients(s, t)
    target = (t + (1 - t) * s**2 / (1 - s) ** 2) / spread * noise - x / (1 - s)
    return ((1 / spread**2).clamp(max=10) * (velocity.float() - target.float().detach()) ** 2).mean()


def state_data_loss(velocity: Tensor, x_tau: Tensor, x0: Tensor, tau: Tensor) -> Tensor:
    """Denoising of re-noised states `x_tau` to the data `x0` that they were made with (TDM, arXiv 2503.06674).

    It is the score of the states as far as their noise is independent of their data. Errors of x0 are weighted by
    `min(SNR, 5)`.
    """
    t = expand(tau, x0)
    error = (x_tau - x0).float().detach() - t * velocity.float()
    return (((1 - t) / t).square().clamp(max=5) * error**2).mean()
