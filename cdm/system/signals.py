"""Signals that ask a process to stop, remembered until it is at a point where it can."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Remembers SIGINT or SIGTERM until a round is over; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        """The number of the signal that has come, or 0."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Takes the signals of this process until the end of the block."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
