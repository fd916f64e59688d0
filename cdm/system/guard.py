"""Ends a program whose parent was killed: a script beside the program, given its number and when it was made.

A process that gets SIGKILL can tidy nothing up. So the guard, which the signal does not reach, waits at a pipe that the
parent holds open: a byte in it says that the program has ended, its end without one that the parent has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def guarded(pid: int) -> Iterator[None]:
    """Until the end of the block, the process `pid` and all that it has started end with this process, however that
    ends. Nothing is guarded where `pid` has ended already."""
    import psutil

    try:
        created = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        yield
        return
    command = [sys.executable, __file__, str(pid), repr(created)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            with suppress(BrokenPipeError):  # somebody has ended the guard
                guard.communicate(b"x")


def kill_tree(pid: int, created: float | None = None) -> None:
    """Kills a process, and all that it has started; `created` is when it started, where another may have its number."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        if created is not None and first.create_time() != created:
            return
        for each in [*first.children(recursive=True), first]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


if __name__ == "__main__":
    if not os.read(sys.stdin.fileno(), 1):
        kill_tree(int(sys.argv[1]), float(sys.argv[2]))
