"""What a distillation will take, before it starts and without weights: memory, FLOPs, disk and time.

Sizes of weights, gradients, optimiser states and files are exact. Activations are counted on fake tensors
(`cdm.planning.footprint`), forwards in closed form. What an allocator wastes and a library keeps for itself is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cdm.errors import CdmError
from cdm.params import Distill, Optimiser, Params, Schedule
from cdm.planning.architectures import Architecture
from cdm.planning.footprint import Footprint, Network
from cdm.training.checkpoint import KEPT
from cdm.training.optim import BLOCK, MESSAGE, fits_8bit
from cdm.training.sharding import blocks_of

Sharding = Literal["none", "fsdp"]
FLOAT32 = 4
ENCODED = {"fp32": 4, "bf16": 2}
"""Bytes of a number in `prompts.precision`."""


# Forwards of a round, in closed form.


@dataclass(frozen=True)
class Forwards:
    """Forwards a sample: without a graph, and with one."""

    plain: float
    with_graph: float

    @property
    def equivalents(self) -> float:
        """In forwards, one with its backward counting 3."""
        return self.plain + 3 * self.with_graph


def mean_depth(schedule: Schedule) -> float:
    """Mean number of steps to a sample's anchor: uniform over 0..N-1 of a schedule of N levels."""
    if schedule.kind == "fixed":
        return (len(schedule.sigmas) - 1) / 2
    return ((schedule.min_len + schedule.max_len) / 2 - 1) / 2


def first_share(schedule: Schedule) -> float:
    """Share of anchors that are pure noise: the mean of 1/N."""
    if schedule.kind == "fixed":
        return 1 / len(schedule.sigmas)
    lengths = range(schedule.min_len, schedule.max_len + 1)
    return sum(1 / length for length in lengths) / len(lengths)


def mean_anchor_sigma(schedule: Schedule, shift: float) -> float:
    """Mean level of an anchor after the shift.

    An inner level of a dynamic schedule, chosen at random, is uniform over the range whatever the spacing.
    """

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if schedule.kind == "fixed":
        return sum(map(shifted, schedule.sigmas)) / len(schedule.sigmas)
    low, high, a = schedule.sigma_min, schedule.sigma_max, shift - 1
    if abs(a) < 1e-6:
        inner = (low + high) / 2
    else:
        inner = shift / a - shift / a**2 * math.log((1 + a * high) / (1 + a * low)) / (high - low)
    first = first_share(schedule)
    return first + (1 - first) * inner


def own_share(distill: Distill, schedule: Schedule, shift: float) -> float:
    """Share of samples at which CA's re-noised point is not DM's, so that the teacher is asked about both."""
    ca, dm = distill.losses.ca, distill.losses.dm
    if not ca.weight:
        return 0.0
    if not dm.weight:
        return 1.0
    if ca.bounded == dm.bounded:
        return 0.0
    return 1 - (first_share(schedule) if dm.bounded else mean_anchor_sigma(schedule, shift))


def keeps_graph(checkpointing: bool, parts: int) -> bool:
    """Whether the student's graph at the anchor is kept from the fake score's updates for its own."""
    return parts == 1 and not checkpointing


def forwards_of_round(
    distill: Distill, schedule: Schedule, shift: float, *, parts: int = 1, learns: bool = True
) -> Forwards:
    """Forwards a sample in a round of `student_every` iterations; `parts` micro-batches a process.

    `learns` is False in the rounds of the fake score alone.
    """
    losses, every = distill.losses, distill.student_every
    weights = losses.weights
    kept = learns and losses.at_anchor and keeps_graph(distill.gradient_checkpointing, parts)
    if losses.ask_fake:
        rollouts = 1 if distill.rollouts == "shared" else every
        plain = rollouts * (mean_depth(schedule) + 1) - kept  # with the student at each anchor
        with_graph = float(every + kept)  # the fake score's updates
        again = learns and losses.at_anchor and not kept
    else:
        plain, with_graph, again = mean_depth(schedule), 0.0, learns and losses.at_anchor
        plain += learns and not losses.at_anchor
    with_graph += again
    if learns:
        for name in ("dm", "cdm", "sgmd", "consistency"):
            if name in weights:
                plain += 1 + (getattr(losses, name).guidance_scale > 1)  # the teacher
        plain += ("dm" in weights) + ("cdm" in weights)  # the fake score
        if losses.ca.weight:
            plain += 1 + own_share(distill, schedule, shift)
        if losses.consistency.weight:
            plain += 1 if losses.consistency.step else 2  # forward-mode differentiation counts 2
        # The student off the trajectory and at the noise of a pair, the fake score with a graph to its input.
        with_graph += ("cdm" in weights) + ("regression" in weights) + ("sgmd" in weights)
    return Forwards(plain, with_graph)


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


# Memory of a process.


@dataclass(frozen=True)
class Sizes:
    """Of a transformer."""

    frozen: int
    """Parameters that do not learn."""
    learning: int
    """Parameters that do."""
    tensors: int
    """Matrices and vectors that learn, each with a step count in the optimiser."""
    in_8bit: int
    """Parameters that learn whose moments can be kept in 8 bits."""
    buffers: int
    """Elements of constants, such as position embeddings."""
    stored: int
    """Elements in its file: parameters, and constants that are stored with them."""
    largest_block: tuple[int, int]
    """Parameters of the largest block, frozen and learning: what sharding gathers at once."""
    outside: tuple[int, int]
    """Parameters in no block, frozen and learning."""


def sizes(architecture: Architecture) -> Sizes:
    """The sizes of `architecture`."""
    with torch.device("meta"):
        model = architecture.build()

    def count(module: nn.Module) -> tuple[int, int]:
        numbers = [0, 0]
        for parameter in module.parameters():
            numbers[parameter.requires_grad] += parameter.numel()
        return numbers[0], numbers[1]

    blocks = [count(block) for block in blocks_of(model)]
    frozen, learning = count(model)
    return Sizes(
        frozen=frozen,
        learning=learning,
        tensors=sum(parameter.requires_grad for parameter in model.parameters()),
        in_8bit=sum(p.numel() for p in model.parameters() if p.requires_grad and fits_8bit(p.shape)),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        stored=sum(value.numel() for value in model.state_dict().values()),
        largest_block=max(blocks, key=sum, default=(0, 0)),
        outside=(frozen - sum(b[0] for b in blocks), learning - sum(b[1] for b in blocks)),
    )


def optimiser_bytes(size: Sizes, settings: Optimiser) -> int:
    """AdamW's states of one role: two moments, and a step count for each tensor; float32 but for 8-bit moments.

    Those are a byte each, and a float32 scale for each block.
    """
    small = size.in_8bit if settings.states == "8bit" else 0
    return FLOAT32 * (2 * (size.learning - small) + size.tensors) + 2 * (small + FLOAT32 * small // BLOCK)


def both_optimisers_bytes(size: Sizes, distill: Distill) -> int:
    """AdamW's states of student and fake score."""
    return optimiser_bytes(size, distill.student) + optimiser_bytes(size, distill.fake)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: what is `kept` all the time, and beside it what each `moment` holds at most."""

    checkpointing: bool
    activations: int
    """Of the student's one graph: what its forward leaves for its backward."""
    kept: dict[str, int]
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.kept.values()) + max(self.moments.values())


class MemoryPlanner:
    """Plans the memory of a process; networks on fake tensors are built once."""

    def __init__(self, params: Params, architecture: Architecture, processes: int, sharding: Sharding) -> None:
        self.params, self.architecture, self.processes = params, architecture, processes
        self.sharded = sharding == "fsdp" and processes > 1
        self.share = per_process(params, processes)
        self.batch = min(params.runtime.micro_batch or self.share, self.share)
        self.parts = -(-self.share // self.batch)
        learner = as_learner(params.distill, architecture)
        self.size, self.teacher_size = sizes(learner), sizes(architecture.frozen())
        autocast = torch.bfloat16 if params.distill.precision == "bf16" else None
        self.running_bytes = (autocast or torch.float32).itemsize
        options = {"autocast": autocast, "cuda": params.runtime.device != "cpu"}
        self.learner = Network.of(learner, sharded=self.sharded, **options)
        self.teacher = Network.of(architecture.frozen(), **options)
        with torch.device("meta"):
            inputs = architecture.inputs(1)
        self.row_bytes = sum(value.nbytes for value in inputs.values())

    def plan(self, checkpointing: bool) -> Memory:
        """The memory with gradient checkpointing on or off."""
        one = self._update(1, checkpointing)
        return Memory(checkpointing, one.held, self._kept(), self._moments(checkpointing, one))

    def _kept(self) -> dict[str, int]:
        size, spread = self.size, self.processes if self.sharded else 1
        learning = FLOAT32 * size.learning // spread
        teacher = self.running_bytes * (self.teacher_size.frozen // spread + size.buffers)
        if self.params.distill.lora is None:
            network = learning + FLOAT32 * size.buffers
            kept = {"teacher": teacher, "student": network, "fake score": network}
        else:
            kept = {"teacher, the base of all": teacher, "adapters of student and fake score": 2 * learning}
        kept["moving average"] = learning
        if self.params.distill.keep == "best":
            kept["moving average of the best probe"] = learning
        kept["AdamW of student and fake score"] = both_optimisers_bytes(size, self.params.distill) // spread
        kept["the batch's conditioning and latents"] = self.share * self.row_bytes
        if self.params.prompts.embed == "online" and not self.params.runtime.offload_encoders:
            kept["text encoders"] = self._encoders()
        return kept

    def _encoders(self) -> int:
        return ENCODED[self.params.prompts.precision] * self.architecture.encoder_parameters

    def _update(self, graphs: int, checkpointing: bool) -> Footprint:
        """Forwards and a backward; of several micro-batches the last, which finds gradients."""
        accumulates = self.parts > 1
        seen = self.learner.update(graphs, self.batch, checkpointing=checkpointing, accumulates=accumulates)
        apart = self._gradients() if accumulates or self.sharded else 0
        return Footprint(seen.held, seen.peak + apart)

    def _moments(self, checkpointing: bool, one: Footprint) -> dict[str, int]:
        losses = self.params.distill.losses
        graphs = losses.at_anchor + bool(losses.cdm.weight) + bool(losses.regression.weight)
        kept = one.held if losses.at_anchor and keeps_graph(checkpointing, self.parts) else 0
        backward = one if graphs == 1 else self._update(graphs, checkpointing)
        gradients, gathered = self._gradients(), self._gathered()
        before = gradients if self.parts > 1 else 0
        reduced = min(gradients, FLOAT32 * MESSAGE) if self.processes > 1 and not self.sharded else 0
        visiting = self.params.prompts.embed == "online" and self.params.runtime.offload_encoders
        encoding = {"encoding a batch's prompts": self._encoders()} if visiting else {}
        return encoding | {
            "rollout": self.learner.forward(self.batch).peak + gathered,
            "fake score's update": kept + one.peak + gathered,
            "questions to teacher and fake score": backward.held + before + self._questions(one) + gathered,
            "student's update": backward.peak + gathered,
            "optimiser step": kept + gradients + reduced,
        }

    def _questions(self, one: Footprint) -> int:
        """The largest call, with its inputs put together: the teacher's, the fake score's, or with a graph to the fake
        score's input, or the student's with its derivative, which is twice a forward."""
        losses = self.params.distill.losses
        weights = losses.weights
        matching = ("dm" in weights) + ("cdm" in weights)
        own = own_share(self.params.distill, self.params.schedule, self.architecture.shift) > 0
        asked = sum(
            1 + (getattr(losses, name).guidance_scale > 1)
            for name in ("dm", "cdm", "sgmd", "consistency")
            if name in weights
        )
        guidance = (1 + own) if losses.ca.weight else 0
        calls = [(self.teacher, asked + guidance), (self.learner, matching)]
        if "consistency" in weights:
            calls.append((self.learner, 1 if losses.consistency.step else 2))
        peaks = [
            network.forward(queries * self.batch).peak + queries * self.batch * self.row_bytes
            for network, queries in calls
            if queries
        ]
        return max([*peaks, one.peak if "sgmd" in weights else 0])

    def _gradients(self) -> int:
        """Of one role: those of the other are gone when it starts."""
        return FLOAT32 * self.size.learning // (self.processes if self.sharded else 1)

    def _gathered(self) -> int:
        """Sharded: parameters outside the blocks, the block at work and the next, in the type in which they run, and
        a block's gradients, twice: whole, and in line for their processes, in float32."""
        if not self.sharded:
            return 0
        (frozen, learning), (outside_frozen, outside_learning) = self.size.largest_block, self.size.outside
        parameters = outside_frozen + outside_learning + 2 * (frozen + learning)
        return self.running_bytes * (parameters + learning) + FLOAT32 * learning


def as_learner(distill: Distill, architecture: Architecture) -> Architecture:
    """The architecture as student and fake score: all of it learns, or an adapter."""
    return architecture if distill.lora is None else architecture.adapted(distill.lora)


def per_process(params: Params, processes: int) -> int:
    """Samples of a process; CdmError if the batch does not divide."""
    share, rest = divmod(params.distill.batch_size, processes)
    if rest:
        raise CdmError(
            f"distill.batch_size {params.distill.batch_size} does not divide over {processes} processes"
        )
    return share


# The whole plan.


@dataclass(frozen=True)
class Compute:
    """What the training computes, all processes together."""

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
    """Of the run, at the assumed rate."""


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
    """What `cdm plan` says."""

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
    peak_flops: float = 400e12,
    utilisation: float = 0.4,
    prompts: int | None = None,
) -> Plan:
    """The plan of `params` on `architecture`, on `processes` GPUs of `peak_flops` FLOP/s used to `utilisation`.

    `prompts` is the number of prompts whose embeddings are stored. Raises CdmError for values out of range, or
    a batch that does not divide over the processes.
    """
    if processes < 1:
        raise CdmError(f"--processes is {processes}: give 1 or more")
    if peak_flops <= 0:
        raise CdmError(f"--flops is {peak_flops:g}: give the peak FLOP/s of a GPU, such as 400e12")
    if not 0 < utilisation <= 1:
        raise CdmError(f"--utilisation is {utilisation:g}: give a share above 0 and up to 1")
    planner = MemoryPlanner(params, architecture, processes, sharding)
    checkpointing = params.distill.gradient_checkpointing
    return Plan(
        architecture=architecture.name,
        parameters=planner.teacher_size.frozen,
        learning=planner.size.learning,
        processes=processes,
        sharding=sharding,
        batch=planner.share,
        micro_batch=planner.batch,
        memory=planner.plan(checkpointing),
        memory_otherwise=planner.plan(not checkpointing),
        compute=plan_compute(params, architecture, planner.parts, processes * peak_flops * utilisation),
        disk=plan_disk(params, architecture, planner.size, prompts),
    )


def plan_compute(params: Params, architecture: Architecture, parts: int, rate: float) -> Compute:
    """FLOPs of the training, and its seconds at `rate` FLOP/s of all processes together."""
    distill = params.distill
    learner = as_learner(distill, architecture)
    forward, update = flops(learner, checkpointing=distill.gradient_checkpointing)
    a_round: list[float] = []
    for learns in (False, True):
        calls = forwards_of_round(distill, params.schedule, architecture.shift, parts=parts, learns=learns)
        a_round.append(distill.batch_size * (calls.plain * forward + calls.with_graph * update))
    fake_only = distill.fake_only // distill.student_every
    rounds = distill.iterations // distill.student_every
    run = fake_only * a_round[0] + (rounds - fake_only) * a_round[1]
    return Compute(
        forward_flops=forward,
        update_flops=update,
        equivalents=calls.equivalents / distill.student_every,
        iteration_flops=a_round[1] / distill.student_every,
        run_flops=run,
        seconds=run / rate,
    )


def plan_disk(params: Params, architecture: Architecture, size: Sizes, prompts: int | None) -> Disk:
    """Embeddings, checkpoints (student, fake score, moving averages and optimisers) and the student, as files."""
    distill, learning = params.distill, FLOAT32 * size.learning
    checkpoint = (4 if distill.keep == "best" else 3) * learning + both_optimisers_bytes(size, distill)
    return Disk(
        prompt=architecture.conditioning_bytes() * ENCODED[params.prompts.precision] // FLOAT32,
        prompts=prompts,
        checkpoint=checkpoint,
        checkpoints=(KEPT + 1) * checkpoint,
        student=FLOAT32 * size.stored if distill.lora is None else learning,
    )


def stored_prompts(params: Params) -> int | None:
    """Number of prompts whose embeddings the stage `prompts` stores; None if the lists cannot be read."""
    from cdm.data.prompts import read_split

    try:
        split, _ = read_split(params)
    except CdmError:
        return None
    return 1 + len(split.eval) + (len(split.train) if params.prompts.embed == "cached" else 0)


# For people.


def table(plan: Plan, params: Params, peak_flops: float, utilisation: float) -> list[str]:
    """The plan as a table; sizes in units of 1000."""
    distill, compute, disk = params.distill, plan.compute, plan.disk
    sharding = "sharded (FSDP2)" if plan.sharding == "fsdp" else "each with all networks"
    processes = f"{plan.processes} processes, {sharding}" if plan.processes > 1 else "one process"
    learning = "all learn" if distill.lora is None else f"{plan.learning:,} of an adapter learn"
    both = sorted((plan.memory, plan.memory_otherwise), key=lambda memory: memory.checkpointing)
    return [
        f"{plan.architecture}: {plan.parameters:,} parameters, {learning}, {distill.precision}",
        f"{distill.iterations:,} iterations of {distill.batch_size} samples; {processes},"
        f" {plan.batch} samples each, {plan.micro_batch} at once",
        "",
        *_memory_lines(both, distill.gradient_checkpointing),
        "",
        "compute, all processes",
        _row("forward-equivalents a sample, an iteration", [f"{compute.equivalents:.2f}"]),
        _row("a forward of a sample", [_flop(compute.forward_flops)]),
        _row("a forward with its backward", [_flop(compute.update_flops)]),
        _row("an iteration", [_flop(compute.iteration_flops)]),
        _row("the run", [_flop(compute.run_flops)]),
        _row(f"time at {peak_flops / 1e12:g} TFLOP/s a GPU, {utilisation:.0%} used", [_time(compute.seconds)]),
        "",
        "disk",
        *_disk_lines(disk),
    ]


def _memory_lines(both: Sequence[Memory], checkpointing: bool) -> list[str]:
    marks = ["(set)" if memory.checkpointing == checkpointing else "" for memory in both]
    rows = [
        _row("memory of a process; gradient checkpointing", ["off", "on"]),
        *([_row("", marks)]),
        *(_row(f"  {name}", [_bytes(memory.kept[name]) for memory in both]) for name in both[0].kept),
        _row("beside these, at most", []),
        *(_row(f"  {name}", [_bytes(memory.moments[name]) for memory in both]) for name in both[0].moments),
        _row("  (what one graph of the student holds)", [_bytes(memory.activations) for memory in both]),
        _row("peak", [_bytes(memory.peak) for memory in both]),
    ]
    return [row.rstrip() for row in rows]


def _disk_lines(disk: Disk) -> list[str]:
    if disk.embeddings is None:
        embeddings = _row("  embeddings, a prompt (the lists cannot be read here)", [_bytes(disk.prompt)])
    else:
        embeddings = _row(f"  embeddings of {disk.prompts:,} prompts", [_bytes(disk.embeddings)])
    return [
        embeddings,
        _row("  checkpoints: two kept, one being written", [_bytes(disk.checkpoints)]),
        _row("  the student's weights", [_bytes(disk.student)]),
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<48}" + "".join(f"{cell:>12}" for cell in cells)


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} {units[-1]}" if value < 10_000 else f"{value:,.0f} {units[-1]}"


def _bytes(value: float) -> str:
    return _scaled(value, ["B", "kB", "MB", "GB"])


def _flop(value: float) -> str:
    return _scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
