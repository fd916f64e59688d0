"""FSDP2: parameters, gradients and optimiser states spread over the processes, by torch's own `fully_shard`.

Each process holds a slice of every tensor; a block of the network is gathered when it is used and let go after it.
Processes must therefore use the network equally often.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_wanted() -> bool:
    """Whether this is one of several processes that a config with `distributed_type: FSDP` has started.

    The launcher's word counts, on any device: accelerate itself does without FSDP on CPUs, and does not say so.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its parameters spread over the processes' devices, block by block.

    A block is a member of one of its lists of modules. Put in from the CPU, the model is never whole on a device.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    # Let go of the rest too: by default it stays whole until a backward, and would miss a change of its parameters.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a slice of it."""
    return isinstance(tensor, DTensor)


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The whole of each tensor, on the CPU. All processes must ask; those that do not `keep` it get nothing."""
    whole = {}
    for name, tensor in tensors.items():
        value = whole_of(tensor.detach())
        if keep:
            whole[name] = value.cpu()
    return whole


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
