"""The memory of programs, looked at from outside while they run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

BETWEEN = 0.05
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


def now() -> int:
    """Anonymous bytes of this process."""
    return _of("self")[0]


def _tree(pid: int) -> tuple[int, int]:
    """Of a process and of those below it."""
    try:
        below = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        below = []
    each = [_of(str(one)) for one in (pid, *below)]
    return sum(anonymous for anonymous, _ in each), sum(resident for _, resident in each)


def _of(pid: str) -> tuple[int, int]:
    """Anonymous and resident bytes; none of a process that is gone."""
    try:
        lines = Path("/proc", pid, "status").read_text().splitlines()
    except OSError:
        return 0, 0
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in ("RssAnon", "VmRSS")}
    return 1024 * kilobytes.get("RssAnon", 0), 1024 * kilobytes.get("VmRSS", 0)
