"""Optimisation: AdamW on the parameters of one network, with its learning-rate schedule and clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from cdm.params import Optimiser
from cdm.training.sharding import as_slice, is_sharded, slice_of, whole_of

MESSAGE = 2**26
"""Numbers that processes average at once: gradients are copied into a message, which is to stay small (268 MB)."""

BLOCK = 256
"""Numbers that share a scale in 8-bit states, a constant of bitsandbytes."""
SMALLEST = 4096
"""Numbers in the smallest parameter whose states are worth 8 bits, as bitsandbytes has it."""


def learning_rate(settings: Optimiser, update: int, updates: int) -> float:
    """The rate of update `update` (from 0) of `updates`: a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, (update + 1) / settings.warmup) if settings.warmup else 1.0
    left, falling = updates - update, updates - settings.decay_from * updates
    fall = min(1.0, left / falling) if falling else 1.0
    return settings.lr * rise * fall


@torch.no_grad()
def blend(target: Iterable[Tensor], source: Iterable[Tensor], share: float) -> None:
    """`target <- (1 - share) * target + share * source`, in place."""
    torch._foreach_lerp_(list(target), list(source), share)


def ema_decay(decay: float, update: int) -> float:
    """The moving average's decay at update `update` (from 0), ramped: `min(decay, (1 + s) / (10 + s))`."""
    return min(decay, (1 + update) / (10 + update))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean of each gradient over the processes.

    Nothing is left to do where there is one process, or the backward pass has done it, slice by slice.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    if any(is_sharded(parameter) for parameter in parameters):
        return
    for gradients in messages([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]):
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def messages(tensors: Sequence[Tensor], limit: int = MESSAGE) -> Iterator[list[Tensor]]:
    """The tensors in groups of up to `limit` numbers; a larger one is a group of its own."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.numel() > limit:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    if group:
        yield group


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scales all gradients so that their common norm is at most `limit`; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole_of(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def fits_8bit(shape: Sequence[int]) -> bool:
    """Whether a parameter's moments can be kept in 8 bits: it is large, and a row of it is of whole blocks.

    So a slice of its rows has the blocks of the whole, and a state can be taken to other numbers of processes.
    """
    return len(shape) > 1 and math.prod(shape) >= SMALLEST and math.prod(shape[1:]) % BLOCK == 0


class AdamW(Protocol):
    """The updates of some parameters, and their states."""

    def step(self, lr: float) -> None:
        """One update with the gradients that are there, by the learning rate `lr`."""
        ...

    def state(self, name: str) -> dict[str, Tensor]:
        """The states of a parameter, sharded as it is."""
        ...

    def room(self, name: str, key: str) -> Tensor:
        """A tensor for one state of a parameter, sharded as it is, to be set in place and then given to `take`."""
        ...

    def take(self, name: str, key: str, state: Tensor) -> None:
        """Goes on from one state of a parameter, in a tensor of `room`."""
        ...


class Float32AdamW:
    """torch's AdamW, in one fused call where the device has it: moments of the parameters' own type."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser) -> None:
        self.parameters = parameters
        values = list(parameters.values())
        self.adamw = torch.optim.AdamW(
            values,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=values[0].device.type in ("cpu", "cuda"),
        )

    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state(self, name: str) -> dict[str, Tensor]:
        return dict(self.adamw.state[self.parameters[name]])

    def room(self, name: str, key: str) -> Tensor:
        parameter = self.parameters[name]
        if key == "step":
            return torch.zeros((), device=parameter.device)
        return torch.zeros_like(parameter, requires_grad=False)

    def take(self, name: str, key: str, state: Tensor) -> None:
        self.adamw.state[self.parameters[name]][key] = state


class EightBitAdamW:
    """bitsandbytes' AdamW: each moment is a byte, and a scale for each block (arXiv 2110.02861).

    It knows no sharded tensors: it is given this process's slices, which it changes in place.
    """

    CODES, SCALES = ("state1", "state2"), ("absmax1", "absmax2")

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser) -> None:
        from bitsandbytes.optim import AdamW8bit

        self.parameters = parameters
        self.slices = {name: nn.Parameter(slice_of(value.detach())) for name, value in parameters.items()}
        self.adamw: Any = AdamW8bit(
            list(self.slices.values()),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            min_8bit_size=0,
        )
        for index, value in enumerate(self.slices.values()):
            self.adamw.init_state(self.adamw.param_groups[0], value, 0, index)

    def step(self, lr: float) -> None:
        for name, parameter in self.parameters.items():
            held = self.slices[name]
            held.data = slice_of(parameter.detach())
            held.grad = None if parameter.grad is None else slice_of(parameter.grad)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()

    def state(self, name: str) -> dict[str, Tensor]:
        parameter, state = self.parameters[name], self.adamw.state[self.slices[name]]
        rows, *row = parameter.shape
        blocks = math.prod(row) // BLOCK
        codes = {key: as_slice(state[key], parameter, parameter.shape) for key in self.CODES}
        scales = {key: as_slice(state[key].view(-1, blocks), parameter, (rows, blocks)) for key in self.SCALES}
        return {"step": torch.tensor(float(state["step"])), **codes, **scales}

    def room(self, name: str, key: str) -> Tensor:
        return self.state(name)[key]

    def take(self, name: str, key: str, state: Tensor) -> None:
        if key == "step":  # the others have been changed in place
            self.adamw.state[self.slices[name]]["step"] = int(state)


class Learner:
    """AdamW on named parameters; `updates_done` counts its steps."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser, updates: int) -> None:
        self.parameters = parameters
        self.settings = settings
        self.updates = updates
        self.updates_done = 0
        kinds: dict[type[Float32AdamW | EightBitAdamW], dict[str, nn.Parameter]] = {}
        for name, value in parameters.items():
            small = settings.states == "8bit" and fits_8bit(value.shape)
            kinds.setdefault(EightBitAdamW if small else Float32AdamW, {})[name] = value
        self.optimisers: list[AdamW] = [kind(part, settings) for kind, part in kinds.items()]
        parts = zip(kinds.values(), self.optimisers, strict=True)
        self.optimiser_of = {name: optimiser for part, optimiser in parts for name in part}

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self.settings, self.updates_done, self.updates)

    def step(self) -> float:
        """One update with the accumulated gradients, which it clears; returns their norm before clipping."""
        parameters = list(self.parameters.values())
        average_gradients(parameters)
        norm = clip_gradients(parameters, self.settings.clip)
        for optimiser in self.optimisers:
            optimiser.step(self.lr)
        for parameter in parameters:
            parameter.grad = None
        self.updates_done += 1
        return norm

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, keyed `moment/parameter`."""
        return {
            f"{key}/{name}": value
            for name in self.parameters
            for key, value in self.optimiser_of[name].state(name).items()
        }

    def restore(
        self, keys: Iterable[str], fill: Callable[[dict[str, Tensor]], None], updates_done: int
    ) -> None:
        """Goes on after `updates_done` updates; `fill` sets tensors, named as in `state`, to what they were then.

        `keys` are those that there are.
        """
        self.updates_done = updates_done
        names = {key: tuple(key.split("/", 1)) for key in keys}
        room = {key: self.optimiser_of[name].room(name, moment) for key, (moment, name) in names.items()}
        fill(room)
        for key, (moment, name) in names.items():
            self.optimiser_of[name].take(name, moment, room[key])
