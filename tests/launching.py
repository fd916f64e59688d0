"""Starting modules of the tests in processes of their own, two of which find each other over gloo.

Importing torch and diffusers takes seconds: a server does it once, and every process is forked from it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])


def _run(module: str, arguments: Sequence[str], environment: dict[str, str], errors: str) -> None:
    """`python -m module arguments`, in the process that has been forked."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__")


class Started:
    """A module that has been started, on one thread."""

    def __init__(self, module: str, *arguments: str | Path, **environment: str) -> None:
        with tempfile.NamedTemporaryFile(prefix="errors-", delete=False) as file:
            self.errors = Path(file.name)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        inputs = (module, [str(argument) for argument in arguments], variables, file.name)
        self.process = SERVER.Process(target=_run, args=inputs)
        self.process.start()

    @property
    def runs(self) -> bool:
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int, str]:
        """Exit code and standard error, once it has ended."""
        self.process.join()
        assert self.process.exitcode is not None
        errors = self.errors.read_text()
        self.errors.unlink()
        return self.process.exitcode, errors


def in_two_processes(module: str, *arguments: str | Path, **environment: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each of the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        Started(module, *arguments, RANK=rank, LOCAL_RANK=rank, **common, **environment) for rank in ("0", "1")
    ]
    return [process.finish() for process in processes]


def succeed_in_two_processes(module: str, *arguments: str | Path, **environment: str) -> None:
    """The same, of a module that must end well."""
    for code, errors in in_two_processes(module, *arguments, **environment):
        assert code == 0, errors
