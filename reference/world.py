"""A training step whose teacher is exact: Gaussian data of two classes in three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdm.params import Distill, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning
from cdm.training.distiller import Distiller
from cdm.training.networks import FullNetworks, LevelAwareFake, Networks
from cdm.training.optim import Learner
from cdm.training.terms import Pairs
from reference.counting import CountingNetworks
from reference.gaussian import GaussianFamily, GaussianModel

DIMENSIONS = 3


def distill_settings(**changes: Any) -> Distill:
    settings: dict[str, Any] = {
        "iterations": 20,
        "batch_size": 6,
        "losses": {
            "ca": {"weight": 1.0, "scale": 2.0},
            "dm": {"weight": 1.0},
            "cdm": {"weight": 0.5},
        },
        "student": {"lr": 1e-2, "warmup": 0},
        "fake": {"lr": 2e-2, "warmup": 0},
    }
    return Distill.model_validate(settings | changes)


SCHEDULE = Schedule(kind="dynamic", min_len=1, max_len=5, sigma_min=0.1, sigma_max=0.9)


def class_means(iteration: int, samples: Sequence[int]) -> Conditioning:
    """Two classes, whose data have their means at -1 and 1."""
    sign = torch.tensor([1.0 if (iteration + sample) % 2 else -1.0 for sample in samples])
    return {"mean": sign[:, None].expand(len(samples), DIMENSIONS)}


def flow_pairs(draws: Draws) -> Pairs:
    """Noise, and where the flow of N(0.5 + mean, 0.7^2), the teacher of `build`, takes it."""
    noise = draws.normal("noise", (DIMENSIONS,))
    conditioning = class_means(draws.iteration, draws.samples)
    return Pairs(noise, 0.5 + conditioning["mean"] + 0.7 * noise, conditioning)


def build(
    kind: Callable[..., Any] = Distiller,
    distill: Distill | None = None,
    schedule: Schedule = SCHEDULE,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    fake: nn.Module | None = None,
    **options: Any,
) -> tuple[Any, CountingNetworks]:
    """A `Distiller`, or another `kind` with its interface, and the networks of which it asks.

    The student starts away from the teacher, so that every gradient is there; the fake score is the teacher unless
    it is given.
    """
    distill = distill or distill_settings()
    teacher = teacher or GaussianModel(DIMENSIONS, offset=0.5, deviation=0.7)
    family: Any = GaussianFamily()
    networks = CountingNetworks(family, teacher)
    networks.models["student"] = student or GaussianModel(DIMENSIONS, offset=-0.3, deviation=1.2)
    networks.models["fake"] = fake or networks.models["fake"]
    roles: Networks = networks
    empty = {"mean": torch.zeros(1, DIMENSIONS)}
    if distill.fake_knows_level:
        roles = LevelAwareFake(networks, family, empty)
    updates = distill.iterations // distill.student_every
    options = {"samples": range(distill.batch_size), "prompts": class_means, "pairs": flow_pairs} | options
    distiller = kind(
        roles,
        Learner(roles.parameters("student"), distill.student, updates),
        Learner(roles.parameters("fake"), distill.fake, distill.iterations),
        distill=distill,
        schedule=schedule,
        shift=2.0,
        seed=3,
        empty=empty,
        latent_shape=(DIMENSIONS,),
        **options,
    )
    return distiller, networks


def parameters(networks: FullNetworks) -> dict[str, Tensor]:
    """A copy of all parameters of all roles."""
    return {
        f"{role}.{name}": value.detach().clone()
        for role, model in networks.models.items()
        for name, value in model.named_parameters()
    }
