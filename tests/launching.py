"""Starting modules of the tests in processes of their own, two of which find each other over gloo."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.forked import Forked

HERE = Path(__file__).parent
SERVER = "CDM_TESTS_SERVER"
"""The variable that names the folder of the fork server; workers of pytest-xdist have it from their parent."""


@contextmanager
def fork_server() -> Iterator[None]:
    """Runs `tests/fork_server.py` meanwhile: `Started` and the command `python()` are forked from it."""
    with tempfile.TemporaryDirectory(prefix="cdm-") as name, socket.socket(socket.AF_UNIX) as listener:
        folder, address = Path(name), f"{name}/socket"
        listener.bind(address)
        listener.listen(32)
        process = subprocess.Popen(
            [sys.executable, HERE / "fork_server.py", str(listener.fileno())],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": f"{name}/hub"},
            pass_fds=[listener.fileno()],
        )
        assert process.stdin is not None
        command = [sys.executable, "-IS", str(HERE / "forked.py"), address, sys.executable]
        script = folder / "python"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$0" "$@"\n')
        script.chmod(0o755)
        os.environ[SERVER] = name
        try:
            yield
        finally:
            del os.environ[SERVER]
            process.stdin.close()
            process.wait()


def python() -> Path:
    """A command that does what Python's does; `-m MODULE` is forked from the server. Its folder holds nothing else."""
    return Path(os.environ[SERVER]) / "python"


class Started:
    """`python -m module arguments`, on one thread."""

    def __init__(self, module: str, *arguments: str | Path, **environment: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `finish` closes it
        self.process = Forked(
            f"{os.environ[SERVER]}/socket",
            module,
            [str(argument) for argument in arguments],
            str(HERE.parent),
            {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            str(python()),
            streams=(0, 1, self.errors.fileno()),
        )

    @property
    def runs(self) -> bool:
        return self.process.runs

    def send(self, number: signal.Signals) -> None:
        self.process.send(number)

    def finish(self) -> tuple[int, str]:
        """Exit code and standard error, once it has ended."""
        code = self.process.wait()
        with self.errors:
            self.errors.seek(0)
            return code, self.errors.read()


def port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_two_processes(module: str, *arguments: str | Path, **environment: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each of the two."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port()),
    }
    processes = [
        Started(module, *arguments, RANK=rank, LOCAL_RANK=rank, **common, **environment) for rank in ("0", "1")
    ]
    return [process.finish() for process in processes]


def succeed_in_two_processes(module: str, *arguments: str | Path, **environment: str) -> None:
    """The same, of a module that must end well."""
    for code, errors in in_two_processes(module, *arguments, **environment):
        assert code == 0, errors
