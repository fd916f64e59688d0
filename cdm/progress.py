"""Progress of anything that takes longer than a few seconds: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_INTERVAL = 30.0
"""Seconds between two lines in a log."""


def track(
    iterable: Iterable[T],
    title: str,
    total: int | None = None,
    unit: str = "it",
    detail: Callable[[], str] = str,
) -> Iterator[T]:
    """`iterable`, with its progress, rate and time left on standard error.

    On a terminal that is a tqdm bar; elsewhere a line at most every `LOG_INTERVAL` seconds, so that what is
    over sooner says nothing. `total` is the number of items where `iterable` has no length.
    """
    if sys.stderr.isatty():
        return iter(tqdm(iterable, desc=title, total=total, unit=unit))
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    return _log(iterable, title, total, unit)


def _log(
    iterable: Iterable[T], title: str, total: int | None, unit: str, detail: Callable[[], str]
) -> Iterator[T]:
    start = shown = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - shown >= LOG_INTERVAL:
            shown = now
            line = " ".join([_line(title, done, total, now - start, unit), detail()]).strip()
            print(line, file=sys.stderr, flush=True)


def _line(title: str, done: int, total: int | None, seconds: float, unit: str) -> str:
    rate = f"{done / seconds:.2f} {unit}/s" if done >= seconds else f"{seconds / done:.2f} s/{unit}"
    if total is None:
        return f"{title}: {done} {unit}, {rate}"
    left = tqdm.format_interval(seconds / done * (total - done))
    return f"{title}: {done}/{total} {unit}, {rate}, {left} left"
