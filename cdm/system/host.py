"""The process on its machine: number of threads, how the C library keeps memory, how much of that is free."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take."""


def prepare(threads: int) -> None:
    """Use so many threads (0 leaves torch's default), and keep the memory that tensors free.

    Torch is told if it is here. If not, it reads the number when it is imported, which a stage with nothing to do
    never does.
    """
    keep_memory()
    if not threads:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next allocations, where it is glibc.

    By default glibc hands large blocks back as they are freed. A training step on the CPU frees all its activations
    and gets them again in the next one: the kernel then clears and maps the same pages anew, thousands of them a
    step. Blocks above 32 MiB, glibc's limit, are still returned.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for name, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            library.mallopt(name, value)


def free_memory() -> int:
    """Bytes that this process could take now without anything being swapped out, a container's limit included."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, taken = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such system, or the limit is the word "max"
        return free
    return min(free, max(limit - taken, 0))
