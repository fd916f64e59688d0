"""Running another program: for a limited time, and with bounds to what it says."""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from cdm.errors import CdmError
from cdm.system.commands import Command
from cdm.system.guard import guarded, kill_tree

PASSED_ON = 20_000
"""Characters of a program's standard error that are shown as they come."""
REMEMBERED = 4_000
"""Characters of its end that are remembered."""
LINES, WIDTH = 3, 200
"""Lines of its end that an error quotes, and characters of each."""
EVERY = 60.0
"""Seconds between two lines that say that it is waited for."""
LAST_WORDS = 5.0
"""Seconds after its end in which what it has left behind may still speak."""


def run(command: Command, more: Sequence[str], *, title: str, minutes: float, limit: str) -> None:
    """Runs a command with some `more` arguments; `title` says on standard error what is waited for.

    What it writes to standard error is passed on within bounds, standard output is dropped. It and all that it has
    started are killed after `minutes`, which the parameter `limit` sets, and when this process ends.

    Raises CdmError if it cannot be started, ends with another exit code than 0, or takes too long; the message ends
    with its last words.
    """
    try:
        process = subprocess.Popen(
            [*command.arguments, *more],
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CdmError(f"{title}: {command.arguments[0]}: {reason}") from None
    print(f"{title}: at most {minutes:g} minutes", file=sys.stderr)
    with _Listener(process) as listener, guarded(process.pid), _killed_at_the_end(process):
        ended = _ended(process, listener, title, minutes)
    if not ended:
        raise CdmError(f"{title}: stopped after {minutes:g} minutes ({limit}): {listener.last_words()}")
    if process.returncode:
        raise CdmError(f"{title}: exit code {process.returncode}: {listener.last_words()}")


def _ended(process: subprocess.Popen[bytes], listener: _Listener, title: str, minutes: float) -> bool:
    """Waits for the end of a process, and says so now and then; False if it takes longer than `minutes`."""
    begun = time.monotonic()
    while True:
        passed = time.monotonic() - begun
        left = minutes * 60 - passed
        if left <= 0:
            return False
        if passed >= EVERY:
            said = f", which says: {listener.line()}" if listener.line() else ""
            print(f"{title}: {passed / 60:.0f} of at most {minutes:g} minutes{said}", file=sys.stderr)
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(left, EVERY))
            return True


class _Listener:
    """Reads the standard error of a process, passes it on up to a limit, and remembers its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._pipe = process.stderr
        self._room = PASSED_ON
        self._end = ""
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.join(LAST_WORDS)  # a process that it has left behind may hold the pipe open

    def _listen(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with self._pipe as pipe:
            while chunk := os.read(pipe.fileno(), 2**16):
                self._hear(decoder.decode(chunk))

    def _hear(self, text: str) -> None:
        self._end = (self._end + text)[-REMEMBERED:]
        if self._room > 0:
            sys.stderr.write(text[: self._room])
            self._room -= len(text)
            if self._room <= 0:
                sys.stderr.write("\n(it says more, which is left out)\n")

    def line(self) -> str:
        """The last line that it has written."""
        return next(iter(self._lines()[-1:]), "")

    def last_words(self) -> str:
        """The last lines that it has written, as one."""
        return " | ".join(self._lines()[-LINES:]) or "it said nothing"

    def _lines(self) -> list[str]:
        """What is remembered, in lines without anything that a terminal would act on, each no longer than WIDTH."""
        printable = ("".join(c if c.isprintable() else " " for c in line) for line in self._end.splitlines())
        lines = (" ".join(line.split()) for line in printable)
        return [
            line if len(line) <= WIDTH else f"\N{HORIZONTAL ELLIPSIS}{line[-WIDTH:]}" for line in lines if line
        ]


@contextmanager
def _killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leaves no process behind, also where this one is to end."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    finally:
        kill(process)
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that still runs, and all that it has started."""
    import psutil

    if process.poll() is None:
        kill_tree(psutil.Process(process.pid))
    process.wait()
