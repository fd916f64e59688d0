"""The three networks of distribution matching, addressed by role: teacher, student and fake score.

The training step asks for the velocity of a role and never whether the roles are three models or three adapters
of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cdm.families.base import Conditioning, Family

Role = Literal["teacher", "student", "fake"]
Trained = Literal["student", "fake"]


class Networks(Protocol):
    """What the training step needs of the networks."""

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The role's velocity at `x` (batch, ...), level `sigma` (batch,): float32, like `x`."""
        ...

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        """The role's trained parameters by name; the student's and the fake score's have the same names."""
        ...

    def backward(self, role: Trained, loss: Tensor) -> None:
        """Adds the loss's gradient to the role's parameters."""
        ...


class FullNetworks:
    """Three models: `teacher` as loaded, and two trainable copies of it in float32."""

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.family = family
        self.autocast = autocast
        student = copy.deepcopy(teacher).float().requires_grad_(True)
        if gradient_checkpointing:
            student.enable_gradient_checkpointing()  # type: ignore[operator]
        self.models: dict[str, nn.Module] = {
            "teacher": teacher.to(autocast or torch.float32).requires_grad_(False),
            "student": student,
            "fake": copy.deepcopy(student),
        }
        for model in self.models.values():
            model.eval()  # no dropout: the rollout and the update must see the same student

    @contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._precision(x.device):
            return self.family.velocity(self.models[role], x, sigma, conditioning).float()

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return dict(self.models[role].named_parameters())

    def backward(self, role: Trained, loss: Tensor) -> None:
        loss.backward()
