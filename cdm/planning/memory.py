"""Memory of a training process: sizes of what is kept are exact, activations are counted on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cdm.errors import CdmError
from cdm.params import Distill, Optimiser, Params
from cdm.planning.architecture import ENCODED, FLOAT32, Architecture
from cdm.planning.decoding import decodes, plan_decoding
from cdm.planning.footprint import Footprint, Network
from cdm.planning.forwards import keeps_graph, unshared_samples
from cdm.training.distiller import parts_of
from cdm.training.optim import BLOCK, MESSAGE, fits_8bit
from cdm.training.quantised import quantised_bytes, quantised_layers
from cdm.training.sharding import blocks_of

Sharding = Literal["none", "fsdp"]
"""none: each process holds all networks; fsdp: FSDP2 spreads them over the processes."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements in a transformer."""

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
    largest: int
    """Elements of the largest tensor."""


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
        largest=max(value.numel() for value in model.state_dict().values()),
    )


def optimiser_bytes(size: Sizes, settings: Optimiser) -> int:
    """AdamW's states of one role: two moments, and a step count for each tensor; float32 but for 8-bit moments.

    Those are a byte each, and a float32 scale for each block.
    """
    small = size.in_8bit if settings.states == "8bit" else 0
    return FLOAT32 * (2 * (size.learning - small) + size.tensors) + 2 * (small + FLOAT32 * small // BLOCK)


def all_optimisers_bytes(size: Sizes, distill: Distill) -> int:
    """AdamW's states of the student, and of the fake score if there is one."""
    fake = optimiser_bytes(size, distill.fake) if distill.losses.ask_fake else 0
    return optimiser_bytes(size, distill.student) + fake


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
        self.spread = processes if self.sharded else 1
        self.share = per_process(params.distill.batch_size, processes)
        self.batch = at_once(params, processes)
        self.parts = -(-self.share // self.batch)
        learner = as_learner(params.distill, architecture)
        self.size, self.teacher_size = sizes(learner), sizes(architecture.frozen())
        autocast = torch.bfloat16 if params.distill.precision == "bf16" else None
        self.running_bytes = (autocast or torch.float32).itemsize
        options = {"autocast": autocast, "cuda": params.runtime.device != "cpu"}
        self.learner = Network.from_architecture(learner, sharded=self.sharded, **options)
        self.teacher = Network.from_architecture(architecture.frozen(), **options)
        self.base = params.distill.lora.base if params.distill.lora else "precision"
        self.rounded = [
            (layer.out_features, layer.in_features) for _, _, layer in quantised_layers(self.teacher.model)
        ]
        self.row_bytes = architecture.sample_bytes()
        self.decoding = plan_decoding(params, architecture) if decodes(params) else None

    def plan(self, checkpointing: bool) -> Memory:
        """The memory with gradient checkpointing on or off."""
        one = self._update(1, checkpointing)
        return Memory(checkpointing, one.held, self._kept(), self._moments(checkpointing, one))

    def networks(self) -> dict[str, int]:
        """Bytes of the networks and of the moving average: what a training starts with."""
        size, spread = self.size, self.spread
        learning = FLOAT32 * size.learning // spread
        lora, fake = self.params.distill.lora, self.params.distill.losses.ask_fake
        teacher = self.running_bytes * (self.teacher_size.frozen // spread + size.buffers) - self._spared()
        if lora is None:
            network = learning + FLOAT32 * size.buffers
            kept = {"teacher": teacher, "student": network} | ({"fake score": network} if fake else {})
        else:
            kept = {"teacher, the base of all": teacher, f"adapters of {trained(fake)}": (1 + fake) * learning}
        return kept | {"moving average": learning}

    def _kept(self) -> dict[str, int]:
        kept, distill = self.networks(), self.params.distill
        if distill.keep == "best":
            kept["moving average of the best probe"] = kept["moving average"]
        states = all_optimisers_bytes(self.size, distill) // self.spread
        kept[f"AdamW of {trained(distill.losses.ask_fake)}"] = states
        kept["the batch's conditioning and latents"] = self.share * self.row_bytes
        if self.params.prompts.embed == "online" and not self.params.runtime.offload_encoders:
            kept["text encoders"] = self.encoders()
        if self.decoding:
            kept["autoencoder, for pictures"] = self.decoding[0]
        return kept

    def _spared(self) -> int:
        """What a frozen base in fewer bits saves."""
        if self.base == "precision":
            return 0
        number = self.running_bytes
        return sum(
            quantised_bytes(shape, "precision", number) - quantised_bytes(shape, self.base, number)
            for shape in self.rounded
        )

    def _restored(self) -> int:
        """The weights of a layer that is kept in fewer bits, made whole for its product: of the largest."""
        if self.base == "precision":
            return 0
        return max(
            (quantised_bytes(shape, "precision", self.running_bytes) for shape in self.rounded), default=0
        )

    def encoders(self) -> int:
        """Bytes of the text encoders."""
        return ENCODED[self.params.prompts.precision] * self.architecture.encoder_parameters

    def _update(self, graphs: int, checkpointing: bool) -> Footprint:
        """Forwards and a backward; of several micro-batches the last, which finds gradients."""
        accumulates = self.parts > 1
        footprint = self.learner.update(
            graphs, self.batch, checkpointing=checkpointing, accumulates=accumulates
        )
        gradients = self._gradients() if accumulates or self.sharded else 0
        return Footprint(footprint.held, footprint.peak + gradients)

    def _moments(self, checkpointing: bool, one: Footprint) -> dict[str, int]:
        losses = self.params.distill.losses
        graphs = losses.at_anchor + sum(needs.student_graph for needs in losses.needs.values())
        kept = one.held if losses.at_anchor and keeps_graph(self.parts) else 0
        backward = one if graphs == 1 else self._update(graphs, checkpointing)
        gradients, gathered = self._gradients(), self._gathered() + self._restored()
        accumulated = gradients if self.parts > 1 else 0
        reduced = min(gradients, FLOAT32 * MESSAGE) if self.processes > 1 and not self.sharded else 0
        visiting = self.params.prompts.embed == "online" and self.params.runtime.offload_encoders
        encoding = {"encoding a batch's prompts": self.encoders()} if visiting else {}
        decoding = {"decoding a picture": self.decoding[1]} if self.decoding else {}
        matched = {"fake score's update": kept + one.peak + gathered} if losses.ask_fake else {}
        return {
            **encoding,
            "rollout": self.learner.forward(self.batch).peak + gathered,
            **matched,
            "questions to teacher and fake score": backward.held
            + accumulated
            + self._questions(one)
            + gathered,
            "student's update": backward.peak + gathered,
            "optimiser step": kept + gradients + reduced,
            **decoding,
        }

    def _questions(self, one: Footprint) -> int:
        """The largest call, with its inputs put together: the teacher's, the fake score's, or with a graph to the fake
        score's input, or the student's with its derivative, which is twice a forward."""
        distill = self.params.distill
        needs = distill.losses.needs.values()
        separate = unshared_samples(distill, self.params.schedule, self.architecture.shift) > 0
        teacher = sum(each.teacher - each.teacher_shared * (not separate) for each in needs)
        calls = [(self.teacher, teacher), (self.learner, sum(each.fake for each in needs))]
        calls += [(self.learner, each.student) for each in needs]
        peaks = [
            network.forward(queries * self.batch).peak + queries * self.batch * self.row_bytes
            for network, queries in calls
            if queries
        ]
        return max([*peaks, one.peak if any(each.fake_graph for each in needs) else 0])

    def _gradients(self) -> int:
        """Of one role: those of the other are gone when it starts."""
        return FLOAT32 * self.size.learning // self.spread

    def _gathered(self) -> int:
        """Sharded: parameters outside the blocks, the block at work and the next, in the type in which they run, and
        a block's gradients, twice: whole, and in line for their processes, in float32."""
        if not self.sharded:
            return 0
        (frozen, learning), (outside_frozen, outside_learning) = self.size.largest_block, self.size.outside
        parameters = outside_frozen + outside_learning + 2 * (frozen + learning)
        return self.running_bytes * (parameters + learning) + FLOAT32 * learning


def trained(fake: bool) -> str:
    """The networks that learn, in a table."""
    return "student and fake score" if fake else "student"


def as_learner(distill: Distill, architecture: Architecture) -> Architecture:
    """The architecture as student and fake score: all of it learns, or an adapter."""
    return architecture if distill.lora is None else architecture.adapted(distill.lora)


def per_process(batch_size: int, processes: int) -> int:
    """Samples of a process; CdmError if the batch does not divide."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise CdmError(f"distill.batch_size {batch_size} does not divide over {processes} processes")
    return share


def at_once(params: Params, processes: int) -> int:
    """Samples of a process in one pass; CdmError if the batch does not divide."""
    samples = range(per_process(params.distill.batch_size, processes))
    return max(len(part) for part in parts_of(samples, params.runtime.micro_batch))
