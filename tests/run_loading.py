"""Networks that are read slice by slice, in one of two processes: `RANK=0 ... python -m tests.run_loading FOLDER NAME`.

FOLDER holds a pipeline of each NAME. What both processes hold together is what one that loads the teacher by diffusers
would have.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.families import get_family
from cdm.families.weights import MappedWeights, constants, fill
from cdm.params import Lora
from cdm.training import sharding
from cdm.training.networks import FullNetworks, LoraNetworks
from cdm.training.start import InFiles, _held_here
from tests.reference_loading import TYPES, reference

CPU = torch.device("cpu")
UNEVEN = {"blocks.0.weight": (3, 4), "blocks.0.bias": (3,), "last.weight": (1, 3), "last.bias": (1,)}


def place(model: nn.Module, fill: sharding.Fill = sharding.nothing, /) -> nn.Module:
    return sharding.shard(model, CPU, None, fill)


def models(networks: Any) -> list[nn.Module]:
    return list(networks.models.values()) if hasattr(networks, "models") else [networks.model]


def compare(name: str, folder: Path) -> None:
    family = get_family(name.partition("_t5")[0])
    for dtype in TYPES:
        options: dict[str, Any] = {"autocast": None if dtype == torch.float32 else dtype}
        for kind in (FullNetworks, partial(LoraNetworks, lora=Lora(rank=3, alpha=3), seed=1)):
            here = kind(family, InFiles(family, folder), place=place, **options)
            whole = kind(family, reference(family, folder), **options)
            for mine, theirs in zip(models(here), models(whole), strict=True):
                held, expected = dict(mine.named_parameters()), dict(theirs.named_parameters())
                assert held.keys() == expected.keys()
                for key, value in expected.items():
                    assert sharding.is_sharded(held[key]), key
                    assert held[key].requires_grad == value.requires_grad, key
                    local = held[key].to_local()
                    assert same(local, half(value.detach())), (name, dtype, key)
                    assert local.untyped_storage().nbytes() <= -(-len(value) // 2) * value[0].nbytes, (
                        "no more is kept"
                    )
                found = constants(mine)
                assert all(same(found[key], value) for key, value in constants(theirs).items())


def half(value: Tensor) -> Tensor:
    """What this process holds of it."""
    chunks, rank = value.chunk(2), torch.distributed.get_rank()
    return chunks[rank] if rank < len(chunks) else value[:0]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


class Uneven(nn.Module):
    """Tensors of three rows and of one, which two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 3)])
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](x))


def compare_uneven(folder: Path) -> None:
    file = folder / f"uneven-{torch.distributed.get_rank()}.safetensors"
    whole = Uneven()
    whole.load_state_dict({name: torch.randn(shape) for name, shape in UNEVEN.items()})
    save_file(whole.state_dict(), file)
    weights = MappedWeights([file], lambda names: None)
    with torch.device("meta"):
        model: nn.Module = Uneven()
    model = place(model, lambda model, device: fill(model, weights, device, take=_held_here))
    x = torch.randn(5, 4)
    assert torch.equal(model(x), whole(x))
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(sharding.whole_of(mine.detach()), theirs.detach())


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    compare_uneven(folder)
    for name in sys.argv[2:]:
        compare(name, folder / name)
    torch.distributed.destroy_process_group()
