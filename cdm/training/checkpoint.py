"""Checkpoints that survive a crash at any moment: atomic, verified, bounded, one writer at a time.

A checkpoint is a folder `step-N` of safetensors and JSON files with their hashes. It is written under another
name, flushed, and renamed, so that it is there whole or not at all; what is torn or altered is found by its
hashes and the one before is used. A group of tensors is one file, or where they are sharded a file of each process;
either can be read by any number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.files import clear_removed, remove_folder, sha256
from cdm.training.tensor_file import write_tensors

log = logging.getLogger(__name__)

KEPT = 2
HASHES, STATE, LOCK = "hashes.json", "state.json", "lock"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: groups of named tensors, those of the training itself; `state`: plain JSON values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk, whole and unaltered. Its tensors stay there until they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]

    @cached_property
    def _files(self) -> dict[Path, str]:
        """The files of tensors, with the group of each: `fake.safetensors`, `fake-00001-of-00002.safetensors`."""
        return {path: path.stem.partition("-")[0] for path in sorted(self.path.glob("*.safetensors"))}

    @property
    def groups(self) -> set[str]:
        """The groups that it has."""
        return set(self._files.values())

    def shapes(self, group: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Type and whole shape of each tensor of a group, in the order of their names."""
        from cdm.training.slices import shapes_in

        return dict(sorted(shapes_in(self._files, group).items()))

    def fill(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Sets tensors in place to those of their names in a group; of a sharded one each process reads its slice.

        Raises CdmError for a name that is not there, or another shape.
        """
        from cdm.training.slices import read_slices

        try:
            read_slices(self._files, group, tensors)
        except (KeyError, ValueError) as error:
            raise CdmError(
                f"{self.path}: not of this training ({error}): remove it, or move it away"
            ) from error

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All groups, read into main memory: for tests and for looking at one."""
        read = {}
        for group in sorted(self.groups):
            read[group] = {
                name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.shapes(group).items()
            }
            self.fill(group, read[group])
        return read


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
    """Writes the checkpoint, then deletes all but the newest `KEPT`. Its tensors are whole, each in its own memory.

    At most one of them is copied to main memory at a time.
    """
    partial = begin(folder, checkpoint.step)
    hashes = {
        f"{group}.safetensors": write_tensors(partial / f"{group}.safetensors", tensors)
        for group, tensors in checkpoint.tensors.items()
    }
    commit(folder, checkpoint.step, hashes, json.dumps(checkpoint.state))


def begin(folder: Path, step: int) -> Path:
    """An empty folder in which the files of a checkpoint are written; what others have left unfinished is deleted."""
    for torn in folder.glob("step-*.partial"):
        shutil.rmtree(torn)
    partial = partial_path(folder, step)
    partial.mkdir(parents=True)
    return partial


def commit(folder: Path, step: int, hashes: dict[str, str], state: str) -> None:
    """Makes a checkpoint of the files that have been written and flushed, and deletes all but the newest `KEPT`.

    `hashes` are the SHA-256 of these files, `state` is a JSON text.
    """
    partial, final = partial_path(folder, step), _path(folder, step)
    content = state.encode()
    _write(partial / STATE, content)
    hashes = dict(sorted({**hashes, STATE: hashlib.sha256(content).hexdigest()}.items()))
    _write(partial / HASHES, json.dumps(hashes).encode())
    _flush(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(folder)
    for old in _steps(folder)[KEPT:]:
        shutil.rmtree(_path(folder, old))


def load_newest(folder: Path, rank: int = 0, count: int = 1, most: Callable[[int], int] = int) -> Saved | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning.

    Of `count` processes that ask for the same one each, by its `rank`, looks at some of the files; `most` is the
    largest of a number over them.
    """
    steps = _steps(folder)
    while (step := most(max(steps, default=-1))) >= 0:
        path = _path(folder, step)
        problem = _damage(path, rank, count)
        if problem:
            log.warning("checkpoint %s is damaged (%s): using the one before", path.name, problem)
        if not most(bool(problem)):
            return Saved(path, step, json.loads((path / STATE).read_text()))
        steps = [each for each in steps if each < step]
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


def _damage(path: Path, rank: int, count: int) -> str | None:
    """What is wrong with this process's share of the files of a checkpoint: missing, torn or altered."""
    try:
        hashes = json.loads((path / HASHES).read_text())
        missing = [name for name in hashes if not (path / name).exists()]
        if missing or not hashes:
            return f"{missing[0] if missing else 'all'} is missing"
        for name, expected in sorted(hashes.items())[rank::count]:
            if sha256(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def partial_path(folder: Path, step: int) -> Path:
    """Where a checkpoint is until it is whole."""
    return folder / f"{_path(folder, step).name}.partial"


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _flush(path)


def _flush(path: Path) -> None:
    """Asks the system to put a file or a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
