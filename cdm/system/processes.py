"""Several processes of one command: the rank of this one, and how they share the drawing of samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.device import choose_device
from cdm.system.launcher import shared_device

if TYPE_CHECKING:
    from accelerate import PartialState

Rows = dict[str, Tensor]

TIMEOUT = timedelta(hours=2)
"""How long processes wait for one another, where nothing else is said."""


def join(device: str, timeout: timedelta = TIMEOUT) -> PartialState:
    """The processes of `accelerate launch` or torchrun, each on its own GPU; without a launcher this one alone.

    `device` is as in `choose_device`, which may raise CdmError; so does a numbered one where there are several
    processes. The first call makes their group, with its `timeout`; later ones find it.
    """
    from accelerate import PartialState

    # Weights would be read by one process of a machine alone, and be sent to the others by what is not used here.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (problem := shared_device(device)):
        raise CdmError(problem)
    chosen = choose_device(device)
    own: dict[str, Any] = {"device_id": chosen} if several and chosen.index is not None else {}
    state = PartialState(cpu=chosen.type == "cpu", timeout=timeout, **own)
    if state.num_processes == 1:
        state.device = chosen  # accelerate takes the first one
    return state


@dataclass(frozen=True)
class Processes:
    """One of the processes that were started together; the main one, rank 0, is the one that writes."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Processes:
        """As the function `join`."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, choose_device(device))
        state = join(device)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The main process's `value`, in all of them."""
        if self.count == 1:
            return value
        agreed = torch.tensor(int(value), device=self.device)
        torch.distributed.broadcast(agreed, src=0)
        return int(agreed)

    def wait(self) -> None:
        """Waits until all processes have come this far, so that the others find what the main process has written."""
        self.agree(0)

    def draw(self, batches: Sequence[range], draw: Callable[[range], Rows]) -> Iterator[Rows]:
        """`draw` of every batch, in their order, to the main process; the others only do their share.

        Batches are dealt out one by one. What is drawn does not depend on the number of processes.
        """
        for start in range(0, len(batches), self.count):
            dealt = batches[start : start + self.count]
            drawn = draw(dealt[self.rank]) if self.rank < len(dealt) else {}
            if self.is_main:
                yield drawn
                for rank in range(1, len(dealt)):
                    yield self._receive(rank, len(dealt[rank]), drawn)
            else:
                for name in sorted(drawn):
                    torch.distributed.send(drawn[name].to(self.device).contiguous(), dst=0)

    def _receive(self, rank: int, count: int, like: Rows) -> Rows:
        """`count` rows of another process, of the names, types and shapes of the rows `like`."""
        rows = {}
        for name in sorted(like):
            tensor = like[name].new_empty(count, *like[name].shape[1:], device=self.device)
            torch.distributed.recv(tensor, src=rank)
            rows[name] = tensor.cpu()
        return rows
