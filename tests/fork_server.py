"""Starts Python processes by forking one that has imported the libraries: `python fork_server.py LISTENER`.

Importing torch, diffusers and what they bring takes eight seconds of a slow processor; the work of a stage on a tiny
model takes one. So what the tests start as processes of their own is forked from this one. `tests/forked.py` asks for
it, over the socket whose file descriptor LISTENER is. Of the repository nothing is imported before: a process has the
code of its own folder, as any other would.

The server runs until its standard input is closed, on one thread. It imports the libraries when it is asked the first
time. A process that nobody waits for any more is killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

LIBRARIES = (
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "accelerate",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "diffusers.guiders",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.ImageDraw",
    "jinja2",
    "pydantic.dataclasses",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "pydantic.types",
    "ruamel.yaml",
    "typer",
    "dvc.cli.parser",
    "dvc.repo.experiments.queue.workspace",
    "dvc.repo.reproduce",
    # What these import when they are used.
    "dvc.cachemgr",
    "dvc.data_cloud",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.plots",
    "dvc.repo.stage",
    "dvc.repo.trie",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.db.local",
    "dvc_data.hashfile.status",
    "fsspec.implementations.memory",
    "networkx",
    "pygit2",
    "rich.json",
)
STREAMS = 3
"""Standard input, output and error: the file descriptors that a request comes with."""
FIRST = "CDM_TESTS_FIRST"
"""The variable that names a script to be run in a process before anything else."""
ANSWER = struct.Struct("!i")
"""What a request is answered with: the number of the process at once, and its exit code at its end."""


@cache
def import_libraries() -> None:
    """Imports them once, and has no collector of garbage write to the memory that all processes share."""
    for name in LIBRARIES:
        import_module(name)
    gc.collect()
    gc.freeze()


class Server:
    """Processes by the connections of those who wait for them."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.processes: dict[int, socket.socket] = {}
        self.ended, ending = socket.socketpair()
        for end in (self.ended, ending):
            end.setblocking(False)
        self.ending = ending
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ending.fileno())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: those who wait pass it on
        self.selector = selectors.DefaultSelector()
        for source in (self.listener, self.ended, sys.stdin):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """None at the end; in a process that has been forked its request, at once."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return self.end()
                elif key.fileobj is self.ended:
                    self.ended.recv(4096)
                    self.report()
                elif key.fileobj is self.listener:
                    request = self.fork(self.listener.accept()[0])
                    if request is not None:
                        return request
                else:
                    self.abandon(key.fileobj)

    def fork(self, connection: socket.socket) -> dict[str, Any] | None:
        """A process for a request; returns the request there, and None here."""
        import_libraries()
        request, streams = receive(connection)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
                os.close(stream)
            self.close(connection)
            return request
        for stream in streams:
            os.close(stream)
        self.processes[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ)
        with suppress(OSError):
            connection.sendall(ANSWER.pack(pid))
        return None

    def report(self) -> None:
        """Says of those that have ended how."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                connection = self.processes.pop(ended[0])
                with suppress(KeyError):  # it has been abandoned
                    self.selector.unregister(connection)
                with suppress(OSError):
                    connection.sendall(ANSWER.pack(os.waitstatus_to_exitcode(ended[1])))
                connection.close()

    def abandon(self, connection: Any) -> None:
        """Kills the process of a connection that has been closed, and what it has started."""
        pid = next((pid for pid, other in self.processes.items() if other is connection), None)
        if pid is None:
            return  # it ended in the same moment, and has been reported
        self.selector.unregister(connection)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def end(self) -> None:
        for pid in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def close(self, connection: socket.socket) -> None:
        """Leaves nothing of the server in a process that has been forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.selector.close()
        for source in (self.listener, self.ended, self.ending, connection, *self.processes.values()):
            source.close()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its file descriptors."""
    head, streams, _, _ = socket.recv_fds(connection, 8, STREAMS)
    body = b""
    length = int.from_bytes(head, "big")
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(streams)


def become(request: dict[str, Any], libraries: list[str]) -> None:
    """`python -m MODULE ARGUMENTS`, as if this process had begun with it."""
    import torch

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.executable = request["executable"]
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [request["folder"], *more, *libraries]
    sys.argv[1:] = request["arguments"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    if FIRST in os.environ:
        runpy.run_path(os.environ[FIRST])
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        leave(end.code)
    leave(None)


def leave(code: object) -> None:
    """Ends the process as `sys.exit(code)` does, without the half second in which Python would free what it has
    imported."""
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    ours = {"", os.path.dirname(__file__), *os.environ.pop("PYTHONPATH", "").split(os.pathsep)}  # noqa: PTH120
    libraries = [path for path in sys.path if path not in ours]
    request = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is not None:
        become(request, libraries)
