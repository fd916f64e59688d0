"""Bad inputs and the commands that are to refuse them: what `tests/test_refusals.py` runs.

A case is a command in a copy of a small repository in which the pipeline has run, after something was broken there.
`python -m tests.refusals` runs all of them, and prints how many end otherwise than with lines that begin with `error:`,
and how long they take.
"""

from __future__ import annotations

import ctypes
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import refusals_world as world

LONGEST_LINE = 700
MOST_LINES = 25


@dataclass(frozen=True)
class Case:
    """A command, and what its error says after `prepare` has broken something in the folder."""

    name: str
    command: tuple[str, ...]
    """`cdm ...`, or `stages.NAME ...` for `python -m stages.NAME ...`."""
    says: str
    prepare: Callable[[Path], object] = lambda folder: None
    code: int = 1
    lines: int = 1
    """How many the error has."""
    within: Callable[[], Any] = ExitStack
    """A context in which the command runs."""
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a command has ended."""

    code: int
    out: str
    err: str
    traceback: str
    seconds: float

    def problem(self, case: Case) -> str:
        """What is wrong with it; empty where it is a refusal as it should be."""
        lines = self.err.splitlines()
        if self.traceback:
            return f"a traceback: {self.traceback}"
        if self.code == 0:
            return f"a silent success: {self.out}"
        if self.code != case.code:
            return f"exit code {self.code}: {self.err}"
        errors = [line for line in lines if line.startswith("error: ")]
        if "Traceback" in self.err or not errors or len(errors) > MOST_LINES:
            return f"not lines of errors: {self.err[:2000]}"
        if any(len(line) > LONGEST_LINE for line in errors):
            return f"too long to read: {max(map(len, errors))} characters"
        if case.lines and len(errors) != case.lines:
            return f"{len(errors)} lines, expected {case.lines}: {self.err[:2000]}"
        if not any(case.says in line for line in errors):
            return f"does not say {case.says!r}: {self.err[:2000]}"
        return ""


def call(command: tuple[str, ...], folder: Path) -> Outcome:
    """Runs a command in this process, in a folder, by the function that the program itself calls."""
    from importlib import import_module

    from cdm import cli
    from stages import common

    name, *arguments = command
    out, err, failure, code = io.StringIO(), io.StringIO(), "", 0
    before, argv = Path.cwd(), sys.argv
    run = cli.main if name == "cdm" else lambda: common.run(import_module(name).main)
    begun = time.perf_counter()
    os.chdir(folder)
    sys.argv = [name, *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - that is what is looked for
        failure = traceback.format_exc()
    finally:
        sys.argv = argv
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue(), failure, time.perf_counter() - begun)


def call_process(python: Path, command: tuple[str, ...], folder: Path) -> Outcome:
    """Runs a command in a process of its own."""
    name, *arguments = command
    module = "cdm.cli" if name == "cdm" else name
    environment = {**os.environ, "PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        [python, "-m", module, *arguments], cwd=folder, env=environment, check=False, capture_output=True, text=True,
        errors="replace", timeout=120,
    )  # fmt: skip
    failure = done.stderr if "Traceback" in done.stderr else ""
    return Outcome(done.returncode, done.stdout, done.stderr, failure, time.perf_counter() - begun)


def run(case: Case, folder: Path) -> Outcome:
    """Runs a case in a fresh copy of the world."""
    case.prepare(folder)
    with case.within():
        return call(case.command, folder)


# Circumstances that a test must make: a user without privileges, a disk that is full.

_VERSION = 0x20080522
_FILE_POWERS = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what lets root read and write everything."""


@contextmanager
def unprivileged() -> Iterator[None]:
    """Has this process, if it is root's, obey the permissions of files meanwhile."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    before = (ctypes.c_uint32 * 6)()
    if library.capget(header, before) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    reduced = (ctypes.c_uint32 * 6)(*before)
    reduced[0] &= ~_FILE_POWERS
    _set(library, header, reduced)
    try:
        yield
    finally:
        _set(library, header, before)


def _set(library: Any, header: Any, powers: Any) -> None:
    if library.capset(header, powers) != 0:
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """No file may become larger meanwhile: writing fails in the middle of a file, as it does on a disk that is full."""
    before, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), sys.pycache_prefix
    with tempfile.TemporaryDirectory() as elsewhere:
        sys.pycache_prefix = elsewhere  # Python leaves what it compiles meanwhile cut off
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            sys.pycache_prefix = compiled


def main() -> None:
    """Runs all cases, one after the other, and prints the counts."""
    from tests.refusals_table import CASES

    outcomes: dict[str, tuple[Case, Outcome]] = {}
    with tempfile.TemporaryDirectory() as name:
        made = world.build(Path(name) / "world", world.teacher(Path(name) / "teacher"), call)
        for number, case in enumerate(CASES):
            folder = Path(name) / str(number)
            world.copy(made, folder)
            outcome = run(case, folder)
            outcomes[case.name] = case, outcome
            world.remove(folder)
            if outcome.problem(case):
                print(f"{case.name}: {outcome.problem(case)}\n")
    ended = [outcome for _, outcome in outcomes.values()]
    slowest = max(outcomes, key=lambda each: outcomes[each][1].seconds)
    print(f"{len(CASES)} cases, {len(outcomes)} names")
    print(f"{sum(bool(each.traceback) for each in ended)} tracebacks")
    print(f"{sum(each.code == 0 and not each.traceback for each in ended)} silent successes")
    print(f"{sum(bool(outcome.problem(case)) for case, outcome in outcomes.values())} not as they should be")
    print(
        f"slowest: {slowest}, {outcomes[slowest][1].seconds:.2f} s; all: {sum(each.seconds for each in ended):.1f} s"
    )
    for case_name in sorted(outcomes, key=lambda each: -outcomes[each][1].seconds)[:12]:
        print(f"  {outcomes[case_name][1].seconds:6.2f} s  {case_name}")


if __name__ == "__main__":
    main()
