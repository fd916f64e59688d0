"""Files and folders that appear whole or not at all, with the permissions that the user's umask gives new ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file or a folder to: at the end it takes the place of `path`.

    What was there before is gone then, all of it. After an error nothing is left of what was written. A link stays a
    link: what it leads to is replaced. Only one process may write to a path at a time. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = hidden(path)
    remove(staged)
    try:
        yield staged
        open_up(staged)
        replace(staged, path)
    finally:
        remove(staged)


def hidden(path: Path) -> Path:
    """The hidden place beside `path` where that which is to take its place is written."""
    return path.with_name(f".{path.name}.partial")


def replace(staged: Path, path: Path) -> None:
    """Move a file or a folder to `path`; a folder that is there is moved aside before, and deleted."""
    if not path.is_dir():
        staged.replace(path)
        return
    old = path.with_name(f".{path.name}.old")
    remove(old)
    path.rename(old)
    staged.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_up(path: Path) -> None:
    """Give a file, or a folder and all in it, the permissions that the umask gives new ones.

    safetensors makes its files private, and what is copied from a read-only teacher is read-only.
    """
    mask = _umask()
    for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if not each.is_symlink():
            mode = each.stat().st_mode & 0o7777
            mode |= 0o777 if each.is_dir() else 0o666
            each.chmod(mode & ~mask)


def _umask() -> int:
    """The umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
