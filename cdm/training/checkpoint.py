"""Checkpoints that survive a crash at any moment: atomic, verified, bounded, one writer at a time.

A checkpoint is a folder `step-N` of safetensors and JSON files with their hashes. It is written under another
name, flushed, and renamed, so that it is there whole or not at all; what is torn or altered is found by its
hashes and the one before is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.files import clear_removed, remove_folder
from cdm.system.writing import open_up

log = logging.getLogger(__name__)

KEPT = 2
HASHES, STATE, LOCK = "hashes.json", "state.json", "lock"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: groups of named tensors; `state`: plain JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@contextmanager
def locked(folder: Path, holds: bool = True) -> Iterator[None]:
    """Holds the folder for this process; CdmError, which names the process, if another that lives holds it.

    Of several processes of one run only one `holds`.
    """
    if not holds:
        yield
        return
    clear_removed(folder.parent)
    with _lock(folder) as handle:
        handle.truncate(0)
        print(json.dumps(asdict(Holder.this())), file=handle, flush=True)
        yield


def _lock(folder: Path) -> TextIO:
    """The file `lock` of the folder, locked until it is closed."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                return handle
        except BlockingIOError:
            handle.seek(0)
            by = Holder.read(handle.read())
            handle.close()
            raise CdmError(
                f"this very experiment is already running{by} (it holds {path}): wait for it or stop it"
            ) from None
        except FileNotFoundError:
            pass
        handle.close()  # the folder was given back meanwhile: the lock is of none that is there


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder, as its lock file names it."""

    pid: int
    host: str
    since: str

    @classmethod
    def this(cls) -> Holder:
        return cls(os.getpid(), socket.gethostname(), datetime.now().astimezone().isoformat(" ", "seconds"))

    @staticmethod
    def read(text: str) -> str:
        """The words on it, for a message; none where the text is no such record."""
        try:
            holder = Holder(**json.loads(text))
        except (ValueError, TypeError):
            return ""
        return f" as process {holder.pid} on {holder.host}, since {holder.since}"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, then deletes all but the newest `KEPT`."""
    final = _path(folder, checkpoint.step)
    partial = final.with_name(f"{final.name}.partial")
    for torn in folder.glob("step-*.partial"):
        shutil.rmtree(torn)
    partial.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial / f"{name}.safetensors")
    (partial / STATE).write_text(json.dumps(checkpoint.state))
    open_up(partial)
    hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / HASHES).write_text(json.dumps(hashes))
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(folder)
    for step in _steps(folder)[KEPT:]:
        shutil.rmtree(_path(folder, step))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for step in _steps(folder):
        path = _path(folder, step)
        problem = _damage(path)
        if problem:
            log.warning("checkpoint %s is damaged (%s): using the one before", path.name, problem)
            continue
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(step, tensors, json.loads((path / STATE).read_text()))
    return None


def give_back(folder: Path, iterations: int) -> None:
    """Deletes the checkpoints of a training that has done all its `iterations`, and no others.

    To be called when its student is safe elsewhere: until then they are what a lost student is written from again.
    """
    if max(_steps(folder), default=-1) < iterations:
        return
    try:
        with locked(folder):
            remove_folder(folder)
    except (CdmError, OSError) as error:
        log.warning("%s is left there: %s", folder, error)


def _damage(path: Path) -> str | None:
    try:
        hashes = json.loads((path / HASHES).read_text())
        for name, expected in hashes.items():
            if _sha256(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Asks the system to put a file or a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
