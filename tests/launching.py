"""Starting a module of the tests in two processes that find each other over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def in_two_processes(module: str, *arguments: str | Path, **environment: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each of the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **common,
                "RANK": rank,
                "LOCAL_RANK": rank,
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate()[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
