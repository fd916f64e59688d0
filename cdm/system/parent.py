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
    parent = os.getppid()
    threading.Thread(target=_follow, args=(parent, every, grace), name="follow parent", daemon=True).start()


def _follow(parent: int, every: float, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)
