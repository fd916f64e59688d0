"""The fingerprint of a training: a hash of all that shapes its student, so that only the same training is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from cdm.params import Params

CODE = (
    "consistency",
    "training/distiller",
    "evaluation/distances",
    "flow",
    "losses",
    "training/networks",
    "training/optim",
    "training/probe",
    "randomness",
    "rollout",
    "schedule",
    "training/sharding",
    "training/loop",
)
"""Modules whose change makes another experiment of the same parameters: no checkpoint is taken across it."""


def fingerprint(params: Params, digests: list[str]) -> str:
    """Names an experiment: equal for runs that would give the same student, so that one resumes another."""
    here = Path(__file__).parent.parent
    code = {name: hashlib.sha256((here / f"{name}.py").read_bytes()).hexdigest() for name in CODE}
    sections = params.model_dump(mode="json", include={"seed", "prompts", "schedule", "distill"})
    identity = json.dumps([sections, digests, code, torch.__version__], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
