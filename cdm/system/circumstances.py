"""The circumstances of a run, for records and reports: date, machine, versions, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cdm.system import git
from cdm.system.device import choose_device
from cdm.system.lock import is_result

PACKAGES = ("torch", "diffusers")
"""Whose versions are recorded, beside Python's."""


@dataclass(frozen=True)
class Circumstances:
    """When, where and with which code something was done. Nothing in it tells whose machine it was."""

    date: str
    """ISO 8601, in UTC."""
    machine: str
    """Processor and GPU, with the number of cores."""
    versions: str
    commit: str | None = None
    """Of the repository; None outside of one."""
    changed: list[str] = field(default_factory=list)
    """Files that differed from the commit, but for results of the pipeline."""

    @classmethod
    def now(cls, device: str = "auto", folder: Path = Path()) -> Circumstances:
        """Those of this process, on `device`, and of the repository around `folder`."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(device),
            versions=", ".join(
                [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
            ),
            commit=git.commit(folder),
            changed=[name for name in git.differing(folder) if not is_result(name)],
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def some_of(files: Sequence[str], most: int) -> str:
    """The first `most` names in backticks, and of the rest the number."""
    more = [f"{len(files) - most} more"] if len(files) > most else []
    return ", ".join([*(f"`{name}`" for name in files[:most]), *more])


def machine(device: str = "auto") -> str:
    """The processor and the number of its cores that this process may use, and the GPU if `device` is one."""
    import torch

    chosen = choose_device(device)
    gpu = f"{torch.cuda.get_device_name(chosen)}, " if chosen.type == "cuda" else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{gpu}{processor()}, {cores} {'core' if cores == 1 else 'cores'}, {platform.system()}"


def processor() -> str:
    """The processor's name, as the system calls it."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()
