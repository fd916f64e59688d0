"""The process that has started this one: where that is killed, this one does not go on alone."""

from __future__ import annotations

import os
import signal
import threading
import time

EVERY = 1.0
"""Seconds between two looks at the parent."""
GRACE = 30.0
"""Seconds for the work after SIGTERM, as a launcher gives them."""


def follow_parent(every: float = EVERY, grace: float = GRACE) -> None:
    """Ends this process after the one that has started it, however that has ended.

    By SIGTERM, on which a training saves, and `grace` seconds later by SIGKILL. A thread looks `every` so many seconds,
    because not every system can tell a process that its parent has died.
    """
    watch = threading.Thread(target=_follow, args=(_parents(), every, grace), name="follow parent", daemon=True)
    watch.start()


def _follow(parents: tuple[int, ...], every: float, grace: float) -> None:
    while _parents() == parents:
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def _parents() -> tuple[int, ...]:
    """The process that has started this one, and where that is a shell with one command the one behind it, too: some
    shells wait for their only command, others become it."""
    import psutil

    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        is_shell = process.cmdline()[-2:-1] == ["-c"] and not process.name().startswith("python")
        return (parent, process.ppid()) if is_shell else (parent,)
    except psutil.Error:
        return (parent,)
