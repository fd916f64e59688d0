"""What a checkpoint of sharded networks costs a training: all of it in the first process, or each process its slices.

    python -m benchmarks.checkpoints [--millions 200]

Two processes over gloo on this machine hold a student's state in halves: weights of student and fake score, the moving
average and AdamW's moments, 28 bytes a parameter. In turn they save it in both ways, while rounds go on that stand for
a training; the second checkpoint is timed, which finds the buffers of the first. `gathered` is how it was done before:
the first process gathers all, writes it, reads it again for the hashes, and the other waits. `sliced` is how it is done
now. `held up` are the seconds that all rounds took longer, `memory` is what a process took at most beside what it held
(RssAnon). Both ways are measured in one run; the ratios are what to look at, on a machine that does other work too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed
import typer
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.system import boundary
from cdm.system.processes import join
from cdm.training.checkpoint import Checkpoint
from cdm.training.saver import Saver
from cdm.training.sharding import shard, whole_of

WIDTH = 2048
GROUPS = ("student", "fake", "average", "student_optimiser", "fake_optimiser")
WAYS = ("gathered", "sliced")
PRELUDE = 8
"""Rounds that tell how long one takes."""


class Network(nn.Module):
    """Square matrices, of so many parameters."""

    def __init__(self, millions: float) -> None:
        super().__init__()
        for index in range(max(1, round(millions * 1e6 / WIDTH**2))):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(WIDTH, WIDTH)))


def make_groups(millions: float) -> dict[str, dict[str, Tensor]]:
    """The state of a training, in sharded tensors."""
    weights = {
        name: value.detach() for name, value in shard(Network(millions), torch.device("cpu")).named_parameters()
    }
    groups: dict[str, dict[str, Tensor]] = {"student": weights}
    for group in GROUPS[1:]:
        moments = ("exp_avg/", "exp_avg_sq/") if group.endswith("optimiser") else ("",)
        groups[group] = {
            f"{moment}{name}": torch.ones_like(value) for moment in moments for name, value in weights.items()
        }
    return groups


def save_gathered(folder: Path, state: Checkpoint, main: bool) -> None:
    """One process makes all tensors whole, writes them and hashes what it has written; the others wait."""
    whole: dict[str, dict[str, Tensor]] = {}
    for group, tensors in state.tensors.items():
        whole[group] = {}
        for name, value in tensors.items():
            full = whole_of(value)
            if main:
                whole[group][name] = full
    if main:
        partial = folder / f"step-{state.step:08d}"
        partial.mkdir(parents=True)
        for group, tensors in whole.items():
            save_file(tensors, partial / f"{group}.safetensors")
        hashes = {}
        for path in sorted(partial.iterdir()):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        (partial / "hashes.json").write_text(json.dumps(hashes))
    torch.distributed.barrier()


def anonymous() -> int:
    """Bytes of main memory that this process has for itself; mapped files are not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(peak: dict[str, int]) -> Iterator[None]:
    """Enters into `peak` the most memory that was taken meanwhile, beside what there was."""
    before, ended = anonymous(), threading.Event()
    peak["bytes"] = 0

    def watch() -> None:
        while not ended.wait(0.01):
            peak["bytes"] = max(peak["bytes"], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def a_round(left: Tensor, right: Tensor, done: bool = True) -> bool:
    """Stands for a round: some products, and waiting for the other process. Whether both are `done`."""
    for _ in range(4):
        left @ right
    both = torch.tensor(int(done))
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MIN)
    return bool(both)


def usual_seconds(operands: tuple[Tensor, Tensor]) -> float:
    """Of a round, the median of some."""
    seconds = []
    for _ in range(PRELUDE):
        begun = time.perf_counter()
        a_round(*operands)
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[PRELUDE // 2]


def work(millions: float, folder: Path) -> dict[str, Any]:
    """What one of the processes measures, in each way."""
    main = join("cpu").process_index == 0
    accelerator = Accelerator(cpu=True)
    groups, operands = make_groups(millions), (torch.randn(1024, 1024), torch.randn(1024, 1024))
    found: dict[str, Any] = {
        "bytes": sum(value.nbytes for tensors in groups.values() for value in tensors.values())
    }
    for way in WAYS:
        peak: dict[str, int] = {}
        with watched(peak), Saver(folder / way, accelerator, timedelta(hours=1)) as saver:
            for step in (1, 2):  # the first one finds no buffers yet
                usual, rounds, done = usual_seconds(operands), 0, False
                state = Checkpoint(step, groups, {"rows": []})
                begun = time.perf_counter()
                if way == "gathered":
                    save_gathered(folder / way, state, main)
                else:
                    saver.save(state)
                call = time.perf_counter() - begun
                while not done:
                    done = a_round(*operands, done=(folder / way / f"step-{step:08d}").exists())
                    rounds += 1
                whole = time.perf_counter() - begun
        found[way] = {"call": call, "held up": max(whole - rounds * usual, call), "memory": peak["bytes"]}
        torch.distributed.barrier()
    return found


def both(millions: float, folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        "-m",
        "benchmarks.checkpoints",
        "--millions",
        str(millions),
        "--folder",
        str(folder),
    ]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate()[0] for process in running]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def table(found: list[dict[str, Any]]) -> str:
    """The measurements as Markdown, with the ratio of the ways."""
    rows = [
        (
            "seconds of the call, the longer of both",
            [max(each[way]["call"] for each in found) for way in WAYS],
            "s",
        ),
        ("seconds held up in all", [max(each[way]["held up"] for each in found) for way in WAYS], "s"),
        (
            "memory, the process that takes most",
            [max(each[way]["memory"] for each in found) / 1e9 for way in WAYS],
            "GB",
        ),
        ("memory, both processes", [sum(each[way]["memory"] for each in found) / 1e9 for way in WAYS], "GB"),
    ]
    lines = [
        f"| a checkpoint of {found[0]['bytes'] / 1e9:.2f} GB | {' | '.join(WAYS)} | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, (old, new), unit in rows:
        lines.append(f"| {name} | {old:.2f} {unit} | {new:.2f} {unit} | {old / max(new, 1e-9):.1f} |")
    return "\n".join(lines)


def main(
    millions: Annotated[float, typer.Option(help="Parameters of the student, in millions.")] = 200,
    folder: Annotated[str, typer.Option(help="Where to write; default: a temporary folder.")] = "",
) -> None:
    """Measure both ways of saving a sharded state."""
    if "RANK" in os.environ:
        print(json.dumps(work(millions, Path(folder))))
        return
    place = Path(tempfile.mkdtemp(dir=folder or None))
    try:
        print(table(both(millions, place)))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    boundary.run(boundary.program(main))
