"""Times that wait for the device, and memory at its peak."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of some repetitions, after one that does not count."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))


def forget_peak(device: torch.device) -> None:
    """Begins anew to look for the peak of the memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Bytes of tensors at the peak, and what the allocator held for them; nothing on the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


class Stopwatch:
    """Seconds by part, each without the parts inside it; waits for the device at both ends of every part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside to `name`."""
        wait(self.device)
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            wait(self.device)
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def around(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted to `name`, or to what `name` makes of its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return timed
