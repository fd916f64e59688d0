"""Kills of two sharded processes, most while checkpoints are being written: nothing that was saved is lost.

Each of a row of trainings is killed and the next goes on; the last one may finish. One process is killed by itself, as
it is about to do something to a file of a checkpoint, and then the other misses it; or both at once, as soon as a
checkpoint is being written. What is left then two go on with, and one alone as well. As in `tests/kills.py`, but
without DVC.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cdm.training import checkpoint
from tests import fatal
from tests.fork_server import FIRST
from tests.launching import Started, port
from tests.test_sharding import FULL, World, assert_alike
from tests.test_training import read_log

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
EVERY, ITERATIONS = 2, 20
RULE = {"process": "", "paths": ["/step-"]}
"""What `tests/fatal.py` counts: what a process does to files of checkpoints, in whichever thread."""
KILLS: list[int | None] = [0, None, 1, None, 0, 1, 0, None]
"""Which process kills itself; None: both are killed."""


class Run:
    """A training by two sharded processes, each of them with rules of `tests/fatal.py`."""

    def __init__(self, world: World, out: Path, rules: list[list[dict[str, Any]]]) -> None:
        self.out = out
        common = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port()),
            "ACCELERATE_USE_FSDP": "true",
            FIRST: str(Path(fatal.__file__)),
        }
        arguments = (world.folder, out, out / "ck", "0")
        self.processes = [
            Started(
                "tests.run_sharded",
                *arguments,
                RANK=rank,
                LOCAL_RANK=rank,
                **{fatal.PLAN: json.dumps(plan)},
                **common,
            )
            for rank, plan in zip(("0", "1"), rules, strict=True)
        ]

    def kill_while_writing(self, step: int, chance: random.Random) -> None:
        """Kills both, at random in the time that the checkpoint of a step is being written."""
        partial = f"ck/*/step-{step:08d}.partial"
        while all(process.runs for process in self.processes) and not list(self.out.glob(partial)):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
        for process in self.processes:
            if process.runs:
                process.send(signal.SIGKILL)

    def finish(self) -> list[tuple[int, str]]:
        return [process.finish() for process in self.processes]


def newest(out: Path) -> int:
    found = [checkpoint.load_newest(folder) for folder in out.glob("ck/*")]
    return max((saved.step for saved in found if saved is not None), default=0)


def test_nothing_is_lost_when_sharded_processes_are_killed(tiny_sd3: Path, tmp_path: Path) -> None:
    world = World(tmp_path / "world", tiny_sd3, runtime={"checkpoint_every": EVERY}, iterations=ITERATIONS)
    counts = [tmp_path / f"count-{rank}" for rank in (0, 1)]
    rules = [[RULE | {"count": str(path)}] for path in counts]
    assert [code for code, _ in Run(world, tmp_path / "whole", rules).finish()] == [0, 0]
    events = [int(path.read_text()) for path in counts]
    assert min(events) > 20, events

    chance, out, steps, writing = random.Random(0), tmp_path / "killed", [0], 0
    for who in KILLS:
        plans: list[list[dict[str, Any]]] = [[], []]
        if who is not None:
            plans[who] = [RULE | {"at": chance.randint(1, 4 * events[who] * EVERY // ITERATIONS)}]
        run = Run(world, out, plans)
        if who is None:
            run.kill_while_writing(min(steps[-1] + EVERY * chance.randint(1, 3), ITERATIONS), chance)
        ended = run.finish()
        steps.append(newest(out))
        assert steps[-1] >= steps[-2], f"a checkpoint was lost: {steps}"
        if steps[-1] == ITERATIONS:
            break
        assert any(code == -signal.SIGKILL for code, _ in ended), ended
        writing += any(out.glob("ck/*/*.partial"))
    print(f"{steps}, {writing} of the kills while writing; events {events}")
    assert max(steps) > 0
    assert writing > 1
    by_one = tmp_path / "by one"
    shutil.copytree(out, by_one)
    world.alone(by_one)  # what two sharded processes have left, one goes on with
    assert_alike(by_one, tmp_path / "whole")
    for code, errors in Run(world, out, [[], []]).finish():
        assert code == 0, errors
    assert (out / FULL).read_bytes() == (tmp_path / "whole" / FULL).read_bytes(), steps
    assert read_log(out) == read_log(tmp_path / "whole")
