"""A process that is forked is one that began with its command: the same output, exit code and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launching import python

PROGRAM = """
import json, os, pathlib, signal, sys, threading, time

what = sys.argv[1]
if what == "say":
    import colour  # beside it

    print(json.dumps([__name__, sys.argv[1:], os.getcwd(), sys.path[0], os.environ["TONE"], colour.NAME]))
    print(sys.stdin.read().upper(), file=sys.stderr)
    sys.exit(3)
elif what == "fail":
    raise ValueError("no")
elif what == "signal":
    signal.raise_signal(signal.SIGKILL)
elif what == "wait":
    pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "colour.py").write_text("NAME = 'red'")
    return tmp_path


def start(folder: Path, executable: Path | str, *arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [executable, *arguments], cwd=folder, text=True, env={**os.environ, "TONE": "dark"}, **pipes
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "program", "say", "-m", "more"),
        ("-u", "-m", "program", "say"),
        ("-m", "program", "signal"),
        ("-c", "import sys; print(sys.argv); sys.exit('bad')", "more"),
        ("program.py", "say"),
    ],
    ids=" ".join,
)
def test_it_does_what_a_new_process_does(folder: Path, arguments: tuple[str, ...]) -> None:
    found = []
    for executable in (sys.executable, python()):
        process = start(folder, executable, *arguments)
        found.append((*process.communicate("read"), process.returncode))
    assert found[0] == found[1]


def test_an_error_is_a_traceback(folder: Path) -> None:
    process = start(folder, python(), "-m", "program", "fail")
    assert process.communicate()[1].endswith("ValueError: no\n")
    assert process.returncode == 1


def wait_for(path: Path) -> int:
    """The number that a process writes."""
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    return int(path.read_text())


@pytest.mark.parametrize(
    ("number", "code", "errors"), [(signal.SIGINT, 1, "interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")]
)
def test_a_signal_reaches_it(folder: Path, number: signal.Signals, code: int, errors: str) -> None:
    process = start(folder, python(), "-m", "program", "wait", "number")
    assert wait_for(folder / "number") != process.pid
    process.send_signal(number)
    assert process.communicate()[1] == errors
    assert process.returncode == code


def test_it_is_killed_when_nobody_waits_for_it(folder: Path) -> None:
    process = start(folder, python(), "-m", "program", "wait", "number")
    number = wait_for(folder / "number")
    process.kill()
    process.communicate()
    while alive(number):
        time.sleep(0.01)


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
