"""The terms of the student's loss, and the fake score's (paper, sections 3.2 and 3.3), in x0 space and float32.

Each student term is a *direction*, a detached displacement of the student's x0, and `direction_loss` turns it into
a loss whose gradient is -2 * direction / size. Tensors are (batch, ...); norms are taken sample by sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _normalised(direction: Tensor, x0_student: Tensor, x0_real: Tensor, min_norm: float) -> Tensor:
    """`direction` over each sample's mean distance between student and teacher; 0 where that is not finite."""
    distance = (x0_real.float() - x0_student.float()).abs().flatten(1).mean(1).clamp(min=min_norm)
    scaled = direction / distance.reshape(-1, *[1] * (direction.ndim - 1))
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).detach()


def guidance_direction(
    x0_student: Tensor, x0_cond: Tensor, x0_uncond: Tensor, scale: float, min_norm: float = 0.1
) -> Tensor:
    """CFG augmentation (CA): `scale * (x0_cond - x0_uncond) / max(mean|x0_cond - x0_student|, min_norm)`.

    `x0_cond` and `x0_uncond` are the teacher's predictions with the prompt and with the empty one.
    """
    direction = scale * (x0_cond.float() - x0_uncond.float())
    return _normalised(direction, x0_student, x0_cond, min_norm)


def matching_direction(x0_student: Tensor, x0_real: Tensor, x0_fake: Tensor, min_norm: float = 0.1) -> Tensor:
    """Distribution matching (DM): `(x0_real - x0_fake) / max(mean|x0_real - x0_student|, min_norm)`.

    `x0_real` is the teacher's prediction, `x0_fake` the fake score's, at the same re-noised point.
    """
    return _normalised(x0_real.float() - x0_fake.float(), x0_student, x0_real, min_norm)


def direction_loss(x0_student: Tensor, direction: Tensor) -> Tensor:
    """`mean((x0_student - stopgrad(x0_student + direction))^2)`: a scalar whose gradient follows `direction`."""
    x0 = x0_student.float()
    return F.mse_loss(x0, (x0 + direction).detach())


def fake_score_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow matching of the fake score on the student's data: `mean((velocity - (noise - x0))^2)`, a scalar."""
    return F.mse_loss(velocity.float(), (noise - x0).float().detach())
