"""Progress of long work: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_INTERVAL = 30.0
"""Seconds between two lines in a log."""
LOG_LINES = 4
"""Of which a rate is the mean: the machine may have been busier before."""

IDLE_WARNINGS = {
    "diffusers.models.modeling_utils": "should be kept in float32: []",
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",
}
"""Never shown, by logger: a cast to another type that concerns no module, a kernel that is not used here."""


def track(
    iterable: Iterable[T],
    title: str,
    total: int | None = None,
    unit: str = "it",
    detail: Callable[[], str] | None = None,
) -> Iterator[T]:
    """`iterable`, with its progress, rate and time left on standard error.

    On a terminal that is a tqdm bar; elsewhere a line at most every `LOG_INTERVAL` seconds, so that what is
    over sooner says nothing. `total` is the number of items where `iterable` has no length; what `detail`
    returns is shown behind the rest.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    show = _bar if sys.stderr.isatty() else _log
    return show(iterable, title, total, unit, detail or str)


def quieten_libraries() -> None:
    """Switch off the loading bars of diffusers and transformers, unless somebody sees them on a terminal."""
    if not sys.stderr.isatty():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _says_something(record: logging.LogRecord) -> bool:
    return IDLE_WARNINGS[record.name] not in record.getMessage()


for _name in IDLE_WARNINGS:  # here, because some are said while a library is imported
    logging.getLogger(_name).addFilter(_says_something)


def _bar(
    iterable: Iterable[T], title: str, total: int | None, unit: str, detail: Callable[[], str]
) -> Iterator[T]:
    bar = tqdm(iterable, desc=title, total=total, unit=unit, dynamic_ncols=True)
    for item in bar:
        yield item
        bar.set_postfix_str(detail(), refresh=False)


def _log(
    iterable: Iterable[T], title: str, total: int | None, unit: str, detail: Callable[[], str]
) -> Iterator[T]:
    lines = deque([(time.monotonic(), 0)], maxlen=LOG_LINES)
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - lines[-1][0] >= LOG_INTERVAL:
            then, before = lines[0]
            lines.append((now, done))
            parts = [f"{title}: {_figures(done, total, (now - then) / (done - before), unit)}", detail()]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def _figures(done: int, total: int | None, seconds: float, unit: str) -> str:
    """How much is done, of how much, at so many seconds an item."""
    rate = f"{1 / seconds:.2f} {unit}/s" if seconds <= 1 else f"{seconds:.2f} s/{unit}"
    if total is None:
        return f"{done} {unit}, {rate}"
    return f"{done}/{total} {unit}, {rate}, {tqdm.format_interval(seconds * (total - done))} left"
