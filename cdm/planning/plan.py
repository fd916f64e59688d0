"""The plan of a distillation, made before it starts and without weights: memory, FLOPs, disk and time.

Sizes of weights, gradients, optimiser states and files are exact, forward passes are in closed form
(`cdm.planning.forwards`), activations are counted on fake tensors (`cdm.planning.memory`). What an allocator wastes
and a library keeps for itself is left out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdm.data.prompt_lists import read_split
from cdm.errors import CdmError
from cdm.params import Distill, Params, Prompts, Schedule
from cdm.planning.architecture import ENCODED, FLOAT32, Architecture
from cdm.planning.forwards import forwards_of_round, forwards_of_training
from cdm.planning.main_memory import MainMemory, plan_main_memory
from cdm.planning.memory import Memory, MemoryPlanner, Sharding, Sizes, all_optimisers_bytes, as_learner
from cdm.training.checkpoint import KEPT

PEAK_FLOPS = 400e12
"""Of a GPU, FLOP/s, where nobody says which one."""


@dataclass(frozen=True)
class Speed:
    """Seconds that this machine's CPU takes for one sample, as measured."""

    forward: float
    update: float
    """For a forward with its backward."""
    threads: int
    samples: int
    """Samples at once in what was measured."""
    scaled: str | None = None
    """What was measured in the place of the whole transformer; None: the whole."""
    share: float = 1.0
    """Of the threads' time in which they had a processor; the rest went to other work on the machine."""


@dataclass(frozen=True)
class Compute:
    """The computation of the training, of all processes together."""

    forward_flops: int
    """Of one sample."""
    update_flops: int
    """Of one sample: forward and backward."""
    equivalents: float
    """Forward-equivalents a sample in an iteration that trains both networks, a forward with backward as 3."""
    iteration_flops: float
    """Mean of a batch's iteration that trains both networks."""
    run_flops: float
    seconds: float
    """Of the run, at the assumed rate or the measured speed."""
    speed: Speed | None = None
    """What the seconds are made from; None: an assumed rate."""


@dataclass(frozen=True)
class Disk:
    """Bytes on disk; None where the prompt lists cannot be read."""

    prompt: int
    """Of one prompt's embedding."""
    prompts: int | None
    """Number of prompts whose embeddings are stored."""
    checkpoint: int
    checkpoints: int
    """The most at once: those kept, and one being written."""
    student: int

    @property
    def embeddings(self) -> int | None:
        return None if self.prompts is None else self.prompts * self.prompt


@dataclass(frozen=True)
class Plan:
    """The plan that `cdm plan` prints."""

    architecture: str
    parameters: int
    learning: int
    """Parameters of the student that learn: all, or its adapter's."""
    processes: int
    sharding: Sharding
    batch: int
    """Samples of a process."""
    micro_batch: int
    memory: Memory
    """As the parameters have it."""
    memory_otherwise: Memory
    """With gradient checkpointing the other way."""
    staging: int
    """Bytes of main memory that a process keeps for its part of a checkpoint: where the networks are sharded."""
    main_memory: MainMemory
    compute: Compute
    disk: Disk

    def as_dict(self) -> dict[str, Any]:
        """As plain values, in bytes, FLOPs and seconds."""
        values = asdict(self)
        for name, memory in (("memory", self.memory), ("memory_otherwise", self.memory_otherwise)):
            values[name]["peak"] = memory.peak
        values["disk"]["embeddings"] = self.disk.embeddings
        return values


def make_plan(
    params: Params,
    architecture: Architecture,
    *,
    processes: int = 1,
    sharding: Sharding = "none",
    peak_flops: float = PEAK_FLOPS,
    utilisation: float = 0.4,
    prompts: int | None = None,
    speed: Speed | None = None,
) -> Plan:
    """The plan of `params` on `architecture`, on `processes` GPUs of `peak_flops` FLOP/s used to `utilisation`, or on a
    CPU of that `speed`, which the processes share.

    `prompts` is the number of prompts whose embeddings are stored. Raises CdmError for values out of range, or
    a batch that does not divide over the processes.
    """
    if processes < 1:
        raise CdmError(f"--processes is {processes}: give 1 or more")
    if not 0 < peak_flops < math.inf:
        raise CdmError(f"--flops is {peak_flops:g}: give the peak FLOP/s of a GPU, such as 400e12")
    if not 0 < utilisation <= 1:
        raise CdmError(f"--utilisation is {utilisation:g}: give a share above 0 and up to 1")
    planner = MemoryPlanner(params, architecture, processes, sharding)
    checkpointing = params.distill.gradient_checkpointing
    disk = plan_disk(params.distill, params.prompts.precision, architecture, planner.size, prompts)
    planned = planner.plan(checkpointing)
    on_cpu = params.runtime.device == "cpu" or speed is not None
    staging = disk.checkpoint // processes if planner.sharded else 0
    return Plan(
        architecture=architecture.name,
        parameters=planner.teacher_size.frozen,
        learning=planner.size.learning,
        processes=processes,
        sharding=sharding,
        batch=planner.share,
        micro_batch=planner.batch,
        memory=planned,
        memory_otherwise=planner.plan(not checkpointing),
        staging=staging,
        main_memory=plan_main_memory(planner, planned, on_cpu, staging),
        compute=plan_compute(
            params.distill,
            params.schedule,
            architecture,
            parts=planner.parts,
            rate=processes * peak_flops * utilisation,
            speed=speed,
        ),
        disk=disk,
    )


def plan_compute(
    distill: Distill,
    schedule: Schedule,
    architecture: Architecture,
    *,
    parts: int,
    rate: float,
    speed: Speed | None = None,
) -> Compute:
    """FLOPs of the training with `parts` micro-batches a process, and its seconds at `rate` FLOP/s of all processes
    together, or at `speed` if that is given."""
    learner = as_learner(distill, architecture)
    forward, update = flops(learner, checkpointing=distill.gradient_checkpointing)
    learning = forwards_of_round(distill, schedule, architecture.shift, parts=parts)
    whole = forwards_of_training(distill, schedule, architecture.shift, parts=parts)

    def run(forward: float, update: float) -> float:
        """The whole run, of what one sample's passes take."""
        return whole.plain * forward + whole.with_graph * update

    a_round = distill.batch_size * (learning.plain * forward + learning.with_graph * update)
    return Compute(
        forward_flops=forward,
        update_flops=update,
        equivalents=learning.equivalents / distill.student_every,
        iteration_flops=a_round / distill.student_every,
        run_flops=run(forward, update),
        seconds=run(forward, update) / rate if speed is None else run(speed.forward, speed.update),
        speed=speed,
    )


def plan_disk(
    distill: Distill,
    precision: Literal["fp32", "bf16"],
    architecture: Architecture,
    size: Sizes,
    prompts: int | None,
) -> Disk:
    """Embeddings of so many `prompts` in their `precision`, checkpoints (student, fake score if there is one, moving
    averages and optimisers) and the student, as files."""
    learning = FLOAT32 * size.learning
    copies = 2 + distill.losses.ask_fake + (distill.keep == "best")
    checkpoint = copies * learning + all_optimisers_bytes(size, distill)
    return Disk(
        prompt=architecture.conditioning_bytes(ENCODED[precision]),
        prompts=prompts,
        checkpoint=checkpoint,
        checkpoints=(KEPT + 1) * checkpoint,
        student=FLOAT32 * size.stored if distill.lora is None else learning,
    )


def stored_prompts(settings: Prompts, seed: int) -> int | None:
    """Number of prompts whose embeddings the stage `prompts` stores; None if the lists cannot be read."""
    try:
        split, _ = read_split(settings, seed)
    except CdmError:
        return None
    return 1 + len(split.eval) + (len(split.train) if settings.embed == "cached" else 0)


def flops(architecture: Architecture, *, checkpointing: bool = False) -> tuple[int, int]:
    """FLOPs of a forward, and of a forward with its backward, of one sample."""
    with torch.device("meta"):
        model, inputs = architecture.build().eval(), architecture.inputs(1)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        architecture.velocity(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    with FlopCounterMode(display=False) as both:
        architecture.velocity(model, inputs).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()
