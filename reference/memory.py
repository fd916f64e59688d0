"""The memory that rounds of the real engine take on the CPU: what the plan's is checked against."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cdm.families import get_family
from cdm.params import Params
from cdm.planning.architecture import Architecture, find
from cdm.training.distiller import Distiller
from cdm.training.setup import build_networks
from cdm.training.state import TrainingState


def rounds(
    params: Params,
    architecture: Architecture,
    count: int = 2,
    started: Callable[[TrainingState], None] | None = None,
) -> None:
    """The engine's first rounds, with everything that a run keeps, on random prompts; `started` is called before."""
    family, source = get_family(params.teacher.family), Path(params.teacher.source)
    inputs = {
        name: torch.randn_like(value)
        for name, value in architecture.inputs(1).items()
        if name in architecture.text_shapes
    }
    of_training: Any = SimpleNamespace(family=family, source=source, empty=inputs)
    networks = build_networks(params.distill, params.seed, of_training, torch.device("cpu"))
    state = TrainingState.start(networks, params.distill)
    if started is not None:
        started(state)
    distiller = Distiller(
        networks,
        state.student,
        state.fake,
        distill=params.distill,
        schedule=params.schedule,
        shift=architecture.shift,
        seed=0,
        prompts=lambda _, samples: {name: v.repeat_interleave(len(samples), 0) for name, v in inputs.items()},
        empty=inputs,
        latent_shape=family.latent_shape(source),
        samples=range(params.distill.batch_size),
        micro_batch=params.runtime.micro_batch,
    )
    for number in range(count):
        distiller.round(number * params.distill.student_every)
        state.update_average(params.distill.ema)


def measure(params: Params, how: str) -> int:
    """Bytes at the peak of `rounds` in this process, by the `allocated` or the `resident` measure."""
    architecture = find(params.teacher, params.prompts.max_sequence_length)
    if how == "resident":
        architecture.family.count_parameters(architecture.configs)  # loads the libraries
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rounds(params, architecture)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rounds(params, architecture)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
