"""The process that has started this one: where that is killed, this one does not go on alone."""

from __future__ import annotations

import os
import signal
import threading
import time

EVERY = 1.0
"""Seconds between two looks at the parent."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable by which torch's launcher is told how many seconds its processes have after a signal to stop."""
GRACE = 3600
"""What it is where the user has not set it: enough to finish a round and to write a large checkpoint to a slow disk."""


def grace() -> float:
    """Seconds that a process has to save after a signal to stop."""
    try:
        return float(os.environ.get(SHUTDOWN, GRACE))
    except ValueError:
        return GRACE


def follow_parent() -> None:
    """Ends this process after the one that has started it, however that has ended.

    By SIGTERM, on which a training saves, and the seconds of `grace` later by SIGKILL. A thread looks now and then,
    because not every system can tell a process that its parent has died.
    """
    watch = threading.Thread(target=_follow, args=(_parents(), grace()), name="follow parent", daemon=True)
    watch.start()


def _follow(parents: tuple[int, ...], grace: float) -> None:
    while _parents() == parents:
        time.sleep(EVERY)
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
