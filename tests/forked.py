"""A process that the fork server makes (`tests/fork_server.py`), and a `python` that stands for one.

    python forked.py SOCKET PYTHON NAME ARGUMENTS

is what NAME, a script of the name `python`, runs for ARGUMENTS: `-m MODULE ...` by the server, with its own standard
streams, folder, environment, signals and exit code; anything else by PYTHON. It imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence

ANSWER = struct.Struct("!i")
"""See `tests/fork_server.py`."""


class Forked:
    """`python -m module arguments` in a folder, started, with these file descriptors as its streams."""

    def __init__(
        self,
        address: str,
        module: str,
        arguments: Sequence[str],
        folder: str,
        environment: dict[str, str],
        executable: str,
        streams: tuple[int, int, int] = (0, 1, 2),
    ) -> None:
        request = {
            "module": module,
            "arguments": list(arguments),
            "folder": folder,
            "environment": environment,
            "executable": executable,
        }
        body = json.dumps(request).encode()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(address)
        socket.send_fds(self.server, [len(body).to_bytes(8, "big")], streams)
        self.server.sendall(body)
        self.pid = self._answer()
        self.code: int | None = None

    def _answer(self) -> int:
        (number,) = ANSWER.unpack(self.server.recv(ANSWER.size, socket.MSG_WAITALL))
        return int(number)

    @property
    def runs(self) -> bool:
        return self.code is None and not select.select([self.server], [], [], 0)[0]

    def send(self, number: int) -> None:
        if self.runs:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; of a signal that ended it, the negative number."""
        if self.code is None:
            self.code = self._answer()
            self.server.close()
        return self.code


def main() -> None:
    address, python, name, *arguments = sys.argv[1:]
    module = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if module[:1] != ["-m"] or len(module) == 1:
        os.execv(python, [name, *arguments])
    passed_on = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all the rest
    process = Forked(address, module[1], module[2:], folder, dict(os.environ), name)
    for number in passed_on:
        signal.signal(number, lambda number, _: process.send(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = process.wait()
    if code < 0:
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
