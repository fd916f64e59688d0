"""The fingerprint of a training: a hash of all that shapes its student, so that only the same training is resumed."""

from __future__ import annotations

import torch

from cdm.params import Params
from cdm.system.files import digest_of
from cdm.system.provenance import code_digest
from cdm.training.inputs import Inputs

SHAPING: dict[str, bool | set[str]] = {
    "seed": True,
    "prompts": {"embed", "max_sequence_length", "precision"},
    "schedule": True,
    "distill": True,
}
"""Parameters that shape a student, as `params` of the stage in dvc.yaml has them; texts of prompts count by hash."""


def fingerprint(params: Params, inputs: Inputs) -> str:
    """The name of an experiment: equal for runs that would give the same student, so that one resumes another."""
    sections = params.model_dump(mode="json", include=SHAPING)
    code = code_digest("distill", inputs.family.name)
    return digest_of([sections, inputs.digests, code, torch.__version__])[:16]
