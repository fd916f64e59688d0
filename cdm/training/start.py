"""What the networks of a training start from: the teacher, in its files or in memory."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cdm.families.base import Family
from cdm.families.common import loading
from cdm.families.weights import MappedWeights, fill, whole
from cdm.training import sharding


class Start(Protocol):
    """A teacher, of which every network of a training starts as a copy."""

    def build(self, dtype: torch.dtype, *, last: bool = False) -> nn.Module:
        """A network that starts as the teacher, in `dtype`; parameters on the meta device are still to be filled.

        No other is asked for after the `last`.
        """
        ...

    def fill(self, model: nn.Module, device: torch.device, prefix: str = "") -> None:
        """Gives a built network those parameters, of which this process may hold slices alone; or a part of it, whose
        names begin with `prefix`."""
        ...


class InFiles:
    """The teacher in its folder: each network is read from its mapped files, in the type and to the place, and for the
    slice, that it is wanted in. Raises CdmError if it cannot be read."""

    def __init__(self, family: Family, source: Path) -> None:
        self.family, self.source = family, source

    @cached_property
    def weights(self) -> MappedWeights:
        return self.family.mapped_weights(self.source)

    def build(self, dtype: torch.dtype, *, last: bool = False) -> nn.Module:
        return self.family.empty_transformer(self.source, dtype)

    def fill(self, model: nn.Module, device: torch.device, prefix: str = "") -> None:
        with loading(self.family.transformer_class_name, self.source):
            fill(model, self.weights, device, take=_held_here, prefix=prefix)


class InMemory:
    """A teacher that is loaded: networks are copies of it, the last is itself."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def build(self, dtype: torch.dtype, *, last: bool = False) -> nn.Module:
        return (self.teacher if last else copy.deepcopy(self.teacher)).to(dtype)

    def fill(self, model: nn.Module, device: torch.device, prefix: str = "") -> None:
        pass


def _held_here(weights: MappedWeights, name: str, like: nn.Parameter, device: torch.device) -> Tensor:
    """The weight `name` where it is whole in every process, or this one's rows of it."""
    rows = sharding.rows_of(like)
    if rows is None:
        return whole(weights, name, like, device)
    here = weights.read(name, like.shape, rows).to(device, like.dtype, copy=True)
    return sharding.as_slice(here, like, like.shape)
