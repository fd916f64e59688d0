"""The methods that are compared, as settings of the one engine: a method is an entry here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cdm.params import Distill, Schedule

DISTILL: dict[str, Any] = {
    "iterations": 1200,
    "batch_size": 256,
    "student_every": 3,
    "fake_only": 60,
    "student": {"lr": 5e-4, "warmup": 20, "decay_from": 0.4},
    "fake": {"lr": 1e-3, "warmup": 20},
    "ema": 0.99,
}
"""What all methods share: 380 updates of the student, of 256 samples each."""

SCHEDULE: dict[str, Any] = {"kind": "dynamic", "min_len": 1, "max_len": 8, "sigma_min": 0.02, "sigma_max": 0.98}
FIXED: dict[str, Any] = {"kind": "fixed"}


def losses(ca: float = 0.0, dm: float = 0.0, cdm: float = 0.0) -> dict[str, Any]:
    """Weights of the matching terms, and the scale of guidance: 0 leaves a term out."""
    return {
        "ca": {"weight": float(ca > 0), "scale": ca},
        "dm": {"weight": dm, "bounded": True},
        "cdm": {"weight": cdm, "bounded": True},
    }


@dataclass(frozen=True)
class Method:
    """What differs from the shared settings, and what the student is to match: the teacher's distribution with
    `guidance` (1: the mixture itself)."""

    title: str
    distill_changes: dict[str, Any]
    schedule_changes: dict[str, Any] = field(default_factory=dict)
    guidance: float = 1.0

    @property
    def distill(self) -> Distill:
        return Distill.model_validate(DISTILL | self.distill_changes)

    @property
    def schedule(self) -> Schedule:
        return Schedule.model_validate(SCHEDULE | self.schedule_changes)


METHODS: dict[str, Method] = {
    "dm-fixed": Method("DM, four fixed levels", {"losses": losses(dm=1)}, FIXED),
    "cdm": Method("DM + CDM, random levels", {"losses": losses(dm=1, cdm=1)}),
    "dm-fixed-level": Method(
        "DM, four fixed levels; level-aware fake score",
        {"losses": losses(dm=1), "fake_knows_level": True},
        FIXED,
    ),
    "cdm-level": Method(
        "DM + CDM, random levels; level-aware fake score",
        {"losses": losses(dm=1, cdm=1), "fake_knows_level": True},
    ),
}
"""By the name that the command takes."""
