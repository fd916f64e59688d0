"""Ends a program whose parent was killed: a script beside the program, given its number.

A process that gets SIGKILL can tidy nothing up. So the guard, which the signal does not reach, waits at a pipe that the
parent holds open: a byte in it says that the program has ended, its end without one that the parent has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


@contextmanager
def guarded(pid: int) -> Iterator[None]:
    """Until the end of the block, the process `pid` and all that it has started end with this process, however that
    ends."""
    command = [sys.executable, __file__, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            with suppress(BrokenPipeError):  # somebody has ended the guard
                guard.communicate(b"x")


def kill_tree(first: psutil.Process) -> None:
    """Kills a process, and all that it has started; nothing where it has ended, and another has its number."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for each in [*first.children(recursive=True), first]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def main() -> None:
    """Wait beside the process that is named, and end it if the parent does not say that it has ended."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(int(sys.argv[1]))
        if not os.read(sys.stdin.fileno(), 1):
            kill_tree(first)


if __name__ == "__main__":
    main()
