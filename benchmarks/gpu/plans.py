"""What `cdm plan` counts for the trainings that are measured; it needs no GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.training import FULL, LORA
from cdm.planning.memory import MemoryPlanner, as_learner
from cdm.planning.plan import flops


def measure(scale: Scale, note: Any) -> None:
    """FLOPs of a forward and of an update, and the planned memory."""
    torch.set_num_threads(2)
    for name, recipe, states in (("lora", LORA, "fp32"), ("full", FULL, "8bit")):
        params = scale.params(recipe, states)
        # The rules of CUDA's autocast, also where this runs on a machine without.
        params = params.model_copy(update={"runtime": params.runtime.model_copy(update={"device": "cuda"})})
        learner = as_learner(params.distill, scale.architecture)
        forward, update = flops(learner, checkpointing=params.distill.gradient_checkpointing)
        teacher, _ = flops(scale.architecture)
        found = {"forward_flops": forward, "update_flops": update, "teacher_forward_flops": teacher}
        note(**{name: found})
        memory = MemoryPlanner(params, scale.architecture, 1, "none").plan(
            params.distill.gradient_checkpointing
        )
        note(**{name: found | {"memory": asdict(memory) | {"peak": memory.peak}}})
