"""8-bit states of sharded parameters, in one of two processes: `RANK=0 ... python -m tests.run_states OUT`.

Five updates, the third from states that were gathered, as in a checkpoint, and put in again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.params import Optimiser
from cdm.training.optim import Learner
from cdm.training.sharding import assign, gather, is_sharded, shard


def network() -> dict[str, nn.Parameter]:
    """Two parameters whose states fit into bytes, and two that are too small or too narrow."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (33, 256), "deep": (17, 2, 256), "narrow": (64, 80), "bias": (33,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def learner(states: str, parameters: dict[str, nn.Parameter] | None = None) -> Learner:
    # Clipping would bring in the norm of all slices, whose sum is in another order than that of the whole.
    settings = Optimiser(lr=1e-2, warmup=0, weight_decay=0.1, clip=1e6, states=states)
    return Learner(parameters or network(), settings, 20)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in network().items():
            self.register_parameter(name, value)


def train(learner: Learner, updates: range) -> None:
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for parameter in learner.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
            assign(parameter.grad, torch.randn(parameter.shape, generator=generator))
        learner.step()


def restore(learner: Learner, state: dict[str, Tensor], updates_done: int) -> None:
    """Sets the learner's states to whole ones."""

    def fill(room: dict[str, Tensor]) -> None:
        for name, value in room.items():
            assign(value, state[name])

    learner.restore(state, fill, updates_done)


def sharded() -> Learner:
    return learner("8bit", dict(shard(Network(), torch.device("cpu")).named_parameters()))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    out = Path(sys.argv[1])
    first, second = sharded(), sharded()
    train(first, range(2))
    assert all(is_sharded(value) for value in first.state().values() if value.ndim)
    for name, value in gather(first.parameters).items():
        assign(second.parameters[name].detach(), value)
    restore(second, gather(first.state()), first.updates_done)
    train(second, range(2, 5))
    for name, tensors in (("states", second.state()), ("weights", second.parameters)):
        whole = gather(tensors)
        if torch.distributed.get_rank() == 0:
            save_file({key: value.contiguous() for key, value in whole.items()}, out / name)
    torch.distributed.destroy_process_group()
