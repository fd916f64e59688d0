"""FSDP2: parameters, gradients and optimiser states spread over the processes, by torch's own `fully_shard`.

Each process holds a slice of every tensor; a block of the network is gathered when it is used and let go after it.
Processes must therefore use the network equally often.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Fill = Callable[[nn.Module, torch.device], None]
"""Gives a model those parameters that are on the meta device, on a device."""


def nothing(model: nn.Module, device: torch.device) -> None:
    """The `Fill` of a model that has all its parameters."""


def is_wanted() -> bool:
    """Whether this is one of several processes that a config with `distributed_type: FSDP` has started.

    The launcher's environment decides, on any device: accelerate itself silently does without FSDP on CPUs.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a transformer: the members of its lists of modules."""
    for part in model.children():
        if isinstance(part, nn.ModuleList):
            yield from part


def shard(
    model: nn.Module,
    device: torch.device,
    compute: torch.dtype | None = None,
    fill: Fill = nothing,
) -> nn.Module:
    """The model with its parameters spread over the processes' devices, block by block.

    Put in from the CPU, the model is never whole on a device. Parameters on the meta device have only a shape until
    `fill` gives each process its slices: so they are whole nowhere. With `compute`, parameters are gathered in that
    type, in which autocast would take them anyway: that halves what travels, and no copy of them waits for the backward
    pass. What this process holds keeps its type, and gradients are summed in float32.
    """
    # Inputs are left to autocast: as bfloat16 a timestep of 1000 would be rounded to a multiple of 4.
    gradients = None if compute is None else torch.float32
    policy = MixedPrecisionPolicy(compute, gradients, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Let go of the rest too: by default it stays whole until a backward, and would miss a change of its parameters.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fill(model, device)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a slice of it."""
    return isinstance(tensor, DTensor)


def slice_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: some of its rows where it is sharded, else all of them."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> slice | None:
    """Which rows of a sharded tensor this process holds; None: it is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    each = -(-len(tensor) // mesh.size())  # as torch.chunk cuts it: the last may have fewer, or none
    first = min(each * mesh.get_local_rank(), len(tensor))
    return slice(first, first + len(tensor.to_local()))


def as_slice(rows: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` as this process's rows of a tensor of a `shape` that is sharded as `like` is, whose rows it shares."""
    if not isinstance(like, DTensor):
        return rows.view(tuple(shape))
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The whole of each tensor, on the CPU. All processes must ask; those that do not `keep` it get nothing."""
    whole = {}
    for name, tensor in tensors.items():
        value = whole_of(tensor.detach())
        if keep:
            whole[name] = value.cpu()
    return whole


def lend(tensors: Mapping[str, Tensor]) -> None:
    """Gives this process's slices of `tensors` to one that asks for each whole, by `whole_of`, in their order."""
    for tensor in tensors.values():
        whole_of(tensor.detach())


def whole_of(tensor: Tensor) -> Tensor:
    """The whole tensor on its device; all processes must ask for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(into: Tensor, whole: Tensor) -> None:
    """Sets a tensor, or this process's slice of it, to the `whole` tensor, which every process has."""
    if isinstance(into, DTensor):
        local = whole.to(into.device)
        into.copy_(distribute_tensor(local, into.device_mesh, into.placements, src_data_rank=None))
    else:
        into.copy_(whole)
