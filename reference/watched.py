"""The memory of programs, looked at from outside while they run."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BETWEEN = 0.1
"""Seconds between two looks."""


@dataclass
class Peaks:
    """Most bytes of a program and of all that it started, and how long it ran."""

    anonymous: int = 0
    """What is its own, and cannot be dropped: RssAnon."""
    resident: int = 0
    """With pages of mapped files, which the system drops when it needs room: VmRSS."""
    seconds: float = 0.0


def watch(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], folder: Path
) -> list[Peaks]:
    """Runs the commands at once in `folder`, and gives the peaks of each. Raises RuntimeError if one fails."""
    begun = time.monotonic()
    started = [
        subprocess.Popen(command, cwd=folder, env=environment)
        for command, environment in zip(commands, environments, strict=True)
    ]
    peaks = [Peaks() for _ in started]
    try:
        while any(process.poll() is None for process in started):
            for process, peak in zip(started, peaks, strict=True):
                if process.poll() is None:
                    anonymous, resident = _tree(process.pid)
                    peak.anonymous = max(peak.anonymous, anonymous)
                    peak.resident = max(peak.resident, resident)
                    peak.seconds = time.monotonic() - begun
            time.sleep(BETWEEN)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
    failed = [command for command, process in zip(commands, started, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(f"failed: {' '.join(failed[0])}")
    return peaks


def processes(count: int) -> list[dict[str, str]]:
    """The environments of so many processes that share the networks; of one that has none to share with."""
    if count == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = str(count)
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [os.environ | shared | rank | {"ACCELERATE_USE_FSDP": "true"} for rank in ranks]


def now() -> int:
    """Anonymous bytes of this process."""
    return _of("self")[0]


def _tree(pid: int) -> tuple[int, int]:
    """Of a process and of those below it."""
    anonymous, resident = _of(str(pid))
    try:
        below = Path("/proc", str(pid), "task", str(pid), "children").read_text().split()
    except OSError:
        below = []
    for child in below:
        more = _tree(int(child))
        anonymous, resident = anonymous + more[0], resident + more[1]
    return anonymous, resident


def _of(pid: str) -> tuple[int, int]:
    """Anonymous and resident bytes; none of a process that is gone."""
    try:
        lines = Path("/proc", pid, "status").read_text().splitlines()
    except OSError:
        return 0, 0
    said = dict(line.split(":", 1) for line in lines)
    anonymous, resident = (1024 * int(said.get(name, "0").split()[0]) for name in ("RssAnon", "VmRSS"))
    return anonymous, resident
