"""Main memory of a training process, beside the device's: at the start and while it trains.

Pages of mapped files are not counted: the system drops them when it needs room.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdm.planning.architecture import FLOAT32
from cdm.planning.memory import Memory, MemoryPlanner

PROGRAM = 340_000_000
"""Bytes of Python with torch and diffusers, as measured on a CPU; CUDA's libraries take more."""


@dataclass(frozen=True)
class MainMemory:
    """Bytes of a process."""

    start: int
    """Once its networks are there."""
    training: int
    """At most, from then on."""


def plan_main_memory(planner: MemoryPlanner, memory: Memory, on_cpu: bool, staging: int = 0) -> MainMemory:
    """What `planner`'s training takes of main memory; `memory` is that of its device, which may be the CPU itself, and
    `staging` are the bytes of a checkpoint that waits there to be written."""
    if on_cpu:
        return MainMemory(PROGRAM + sum(planner.networks().values()), PROGRAM + memory.peak + staging)
    # Networks are read tensor by tensor, and a student is written so; constants begin there.
    passing = FLOAT32 * (planner.size.largest + planner.size.buffers)
    prompts, runtime = planner.params.prompts, planner.params.runtime
    encoders = planner.encoders() if prompts.embed == "online" and runtime.offload_encoders else 0
    return MainMemory(PROGRAM + passing, PROGRAM + passing + encoders + staging)
