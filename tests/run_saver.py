"""Checkpoints of sharded tensors, in one of two processes: `RANK=0 ... python -m tests.run_saver OUT`.

What a single process finds afterwards is looked at by tests/test_saver.py.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.system.processes import join
from cdm.training import slices
from cdm.training.checkpoint import Checkpoint
from cdm.training.saver import Saver
from cdm.training.sharding import assign, is_sharded, shard, whole_of

SHAPES = {"odd": (33, 4), "three": (17, 2, 5), "row": (1, 300), "even": (8,)}
"""Rows that do not divide over two processes, and a single one, of which the second process has nothing."""


def numbers(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Whole tensors that differ in every step."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def state(step: int) -> dict[str, Any]:
    return {"rows": [{"iteration": step}]}


class Network(nn.Module):
    def __init__(self, step: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in numbers(step, dtype).items():
            self.register_parameter(name, nn.Parameter(value))


def sharded(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(shard(Network(step, dtype), torch.device("cpu")).named_parameters())


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    """Sharded tensors, of two types, with a number that both processes have."""
    return {"student": sharded(step), "fake": {**sharded(step, torch.bfloat16), "count": torch.tensor(step)}}


def assert_holds(tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    for group, dtype in (("student", torch.float32), ("fake", torch.bfloat16)):
        for name, value in numbers(step, dtype).items():
            assert torch.equal(whole_of(tensors[group][name].detach()), value), (group, name)
    assert int(tensors["fake"]["count"]) == step


class Gate:
    """Holds up the writing of files until it is opened; then the writing of those on rank `fails` fails."""

    def __init__(self, rank: int, fails: int | None = None) -> None:
        self.real, self.opened, self.fails = slices.write_tensors, threading.Event(), rank == fails

    def __call__(self, path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]]) -> str:
        assert self.opened.wait(60)
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(path, tensors, offsets)


def main(out: Path) -> None:
    processes = join("cpu")
    rank, timeout = processes.process_index, timedelta(minutes=1)
    accelerator = Accelerator(cpu=True)

    def steps() -> list[str]:
        torch.distributed.barrier()
        return sorted(path.name for path in out.glob("step-*"))

    # Training goes on, and changes the tensors, while the first is being written; the second waits for it.
    saver, tensors, gate = Saver(out, accelerator, timeout), groups(1), Gate(rank)
    assert saver.newest() is None
    assert all(is_sharded(value) for value in tensors["student"].values())
    slices.write_tensors = gate
    saver.save(Checkpoint(1, tensors, state(1)))
    for name, value in numbers(2).items():
        assign(tensors["student"][name], value)
    assert not (out / "step-00000001").exists()
    gate.opened.set()
    saver.save(Checkpoint(2, groups(2), state(2)))
    assert (out / "step-00000001").exists()
    saver.wait()
    assert steps() == ["step-00000001", "step-00000002"]

    # What one process cannot write, all know of; what was there stays.
    with Saver(out, accelerator, timeout) as failing:
        slices.write_tensors = gate = Gate(rank, fails=1)
        failing.save(Checkpoint(3, groups(3), state(3)))
        gate.opened.set()
        assert failing._thread is not None
        failing._thread.join()
        assert failing.failed
        with pytest.raises(CdmError, match="the disk is full"):
            failing.wait()
        slices.write_tensors = gate.real
        assert "step-00000003" not in steps()
        failing.save(Checkpoint(4, groups(4), state(4)))
    assert steps() == ["step-00000002", "step-00000004"]

    # Into other tensors, sharded and whole; what each process has read is what was written.
    saved = saver.newest()
    assert saved is not None
    assert (saved.step, saved.state) == (4, state(4))
    spread = groups(9)
    whole = {
        group: {name: whole_of(value.detach()) for name, value in spread[group].items()} for group in spread
    }
    for into in (spread, whole):
        for group in saved.groups:
            saved.fill(group, into[group])
        assert_holds(into, 4)

    # A byte of a file of the second process: both take the one before, whoever has looked at that file.
    torch.distributed.barrier()
    if rank == 0:
        (torn,) = out.glob("step-00000004/student-00002-of-00002.safetensors")
        content = bytearray(torn.read_bytes())
        content[-1] ^= 1
        torn.write_bytes(content)
    torch.distributed.barrier()
    before = saver.newest()
    assert before is not None
    assert before.step == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
