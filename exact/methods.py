"""The methods that are compared, as settings of one training step: a method is an entry here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cdm.params import Distill, Schedule

UPDATES, FAKE_ONLY = 380, 20
"""Updates of the student, and rounds before them in which the fake score learns alone."""

DISTILL: dict[str, Any] = {
    "batch_size": 256,
    "student": {"lr": 5e-4, "warmup": 20, "decay_from": 0.4},
    "fake": {"lr": 1e-3, "warmup": 20},
    "ema": 0.99,
}
"""What all methods share, beside the number of the student's updates."""

SCHEDULE: dict[str, Any] = {"kind": "dynamic", "min_len": 1, "max_len": 8, "sigma_min": 0.02, "sigma_max": 0.98}
FIXED: dict[str, Any] = {"kind": "fixed"}
PHASES: dict[str, Any] = {"kind": "fixed", "ends": "next"}
ONE_STEP: dict[str, Any] = {"kind": "fixed", "sigmas": [1.0]}


def losses(
    ca: float = 0.0,
    dm: float = 0.0,
    cdm: float = 0.0,
    scale: float = 1.0,
    bounded: bool = True,
    ca_bounded: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """Weights of the matching terms, where 0 leaves one out; `ca` is the scale of its guidance, `scale` that of the
    teacher which DM matches. `bounded` is DM's and CDM's."""
    return {
        "ca": {"weight": float(ca > 0), "scale": ca, "bounded": ca_bounded},
        "dm": {"weight": dm, "bounded": bounded, "guidance_scale": scale},
        "cdm": {"weight": cdm, "bounded": bounded},
        **others,
    }


@dataclass(frozen=True)
class Method:
    """What differs from the shared settings, and what the student is to match: the teacher's distribution with
    `guidance` (1: the mixture itself). `fakes` is the number of fake-score updates to one of the student."""

    group: str
    """The methods that it is drawn with."""
    title: str
    distill_changes: dict[str, Any]
    schedule_changes: dict[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    fakes: int = 3
    rate: float = 1.0
    """Of both networks, in units of that in DISTILL."""

    @property
    def label(self) -> str:
        """The title, and whether the fake score is conditioned on the noise level (level-aware)."""
        return self.title + ("; level-aware" if self.distill.fake_knows_level else "")

    @property
    def distill(self) -> Distill:
        rounds = {
            "student_every": self.fakes,
            "fake_only": FAKE_ONLY * self.fakes,
            "iterations": (FAKE_ONLY + UPDATES) * self.fakes,
        }
        rates = {name: DISTILL[name] | {"lr": self.rate * DISTILL[name]["lr"]} for name in ("student", "fake")}
        return Distill.model_validate(DISTILL | rates | rounds | self.distill_changes)

    @property
    def schedule(self) -> Schedule:
        return Schedule.model_validate(SCHEDULE | self.schedule_changes)


TOLD: dict[str, Any] = {"fake_knows_level": True}
GUIDANCE = 1.5
"""Of the guided rows."""

DM, FAST, OTHERS = "Distribution matching", "Three times the rate, any tau", "Other methods"
GUIDED, LEVELS = f"With guidance {GUIDANCE:g}", f"Guidance {GUIDANCE:g}: where tau lies"

METHODS: dict[str, Method] = {
    "dm-fixed": Method(DM, "DM, four fixed levels", {"losses": losses(dm=1)}, FIXED),
    "cdm": Method(DM, "DM + CDM, random levels", {"losses": losses(dm=1, cdm=1)}),
    "dm-fixed-level": Method(DM, "DM, four fixed levels", {"losses": losses(dm=1)} | TOLD, FIXED),
    "dm-level": Method(DM, "DM, random levels", {"losses": losses(dm=1)} | TOLD),
    "cdm-level": Method(DM, "DM + CDM, random levels", {"losses": losses(dm=1, cdm=1)} | TOLD),
    "dm-fixed-fast": Method(
        FAST,
        "DM, four fixed levels, 3 x rate",
        {"losses": losses(dm=1, bounded=False)} | TOLD,
        FIXED,
        rate=3,
    ),
    "cdm-fast": Method(
        FAST,
        "DM + CDM, random levels, 3 x rate",
        {"losses": losses(dm=1, cdm=1, bounded=False)} | TOLD,
        rate=3,
    ),
    "dm-fast": Method(
        FAST,
        "DM, random levels, 3 x rate",
        {"losses": losses(dm=1, bounded=False)} | TOLD,
        rate=3,
    ),
    "dmd": Method(
        OTHERS,
        "DMD: one level, regression onto pairs",
        {"losses": losses(dm=1, bounded=False, regression={"weight": 0.25})},
        ONE_STEP,
    ),
    "phased-dmd": Method(
        OTHERS,
        "Phased DMD (one network)",
        {"losses": losses(dm=1, bounded=False), "fake_target": "score"} | TOLD,
        PHASES,
    ),
    "tdm": Method(
        OTHERS, "TDM", {"losses": losses(dm=1), "fake_target": "data", "fake_bounded": True}, PHASES, fakes=1
    ),
    "sgmd": Method(OTHERS, "SGMD, four fixed levels", {"losses": losses(sgmd={"weight": 1.0})}, FIXED, fakes=1),
    "consistency": Method(
        OTHERS,
        "Consistency (sCM)",
        {"losses": losses(consistency={"weight": 1.0, "warmup": UPDATES, "step": 0.05})},
        fakes=1,
    ),
    "dmd2-guided": Method(
        GUIDED,
        "DMD2 (no GAN), four fixed levels",
        {"losses": losses(dm=1, scale=GUIDANCE)},
        FIXED,
        GUIDANCE,
    ),
    "decoupled-dmd-guided": Method(
        GUIDED, "CA + DM, four fixed levels", {"losses": losses(ca=GUIDANCE - 1, dm=1)}, FIXED, GUIDANCE
    ),
    "cdm-guided": Method(
        GUIDED,
        "CA + DM + CDM, random levels",
        {"losses": losses(ca=2 * (GUIDANCE - 1), dm=1, cdm=1)},
        guidance=GUIDANCE,
    ),
    "dmd2-guided-level": Method(
        GUIDED,
        "DMD2 (no GAN), four fixed levels",
        {"losses": losses(dm=1, scale=GUIDANCE)} | TOLD,
        FIXED,
        GUIDANCE,
    ),
    "decoupled-dmd-guided-level": Method(
        GUIDED,
        "CA + DM, four fixed levels",
        {"losses": losses(ca=GUIDANCE - 1, dm=1)} | TOLD,
        FIXED,
        GUIDANCE,
    ),
    "cdm-guided-level": Method(
        GUIDED,
        "CA + DM + CDM, random levels",
        {"losses": losses(ca=2 * (GUIDANCE - 1), dm=1, cdm=1)} | TOLD,
        guidance=GUIDANCE,
    ),
    "decoupled-dmd-apart": Method(
        LEVELS,
        "CA + DM, fixed, CA alone bounded",
        {"losses": losses(ca=GUIDANCE - 1, dm=1, bounded=False)} | TOLD,
        FIXED,
        GUIDANCE,
    ),
    "decoupled-dmd-unbounded": Method(
        LEVELS,
        "CA + DM, fixed, none bounded",
        {"losses": losses(ca=GUIDANCE - 1, dm=1, bounded=False, ca_bounded=False)} | TOLD,
        FIXED,
        GUIDANCE,
    ),
    "cdm-apart": Method(
        LEVELS,
        "CA + DM + CDM, CA alone bounded",
        {"losses": losses(ca=2 * (GUIDANCE - 1), dm=1, cdm=1, bounded=False)} | TOLD,
        guidance=GUIDANCE,
    ),
    "cdm-unbounded": Method(
        LEVELS,
        "CA + DM + CDM, none bounded",
        {"losses": losses(ca=2 * (GUIDANCE - 1), dm=1, cdm=1, bounded=False, ca_bounded=False)} | TOLD,
        guidance=GUIDANCE,
    ),
}
"""By the name that the command takes. CA's scale is doubled where a CDM term as heavy as DM dilutes it."""
