"""Settings of the process on its machine: number of threads, and how the C library keeps memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""


def prepare(threads: int) -> None:
    """Use so many threads (0 leaves torch's default), and keep the memory that tensors free."""
    keep_memory()
    if threads:
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
