"""Hashes of files, remembered from one run to the next; JSON files, written atomically and always as the same bytes;
folders that are removed whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cdm.errors import CdmError
from cdm.system.problems import naming

REMOVED = ".removed"
"""Ending of the names of folders that are being deleted."""
SETTLED = 2.0
"""Seconds after which a file's time of change tells it from a later state: clocks of file systems are coarse."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any, *, lists_in_a_line: bool = False) -> None:
    """Write `value` as readable JSON, atomically and always as the same bytes; lists of numbers take a line each
    number, or one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if lists_in_a_line:
        text = re.sub(r"\[\s+([-+.\dEe,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically: a reader sees the old text or the new one, and nothing between."""
    with naming(path):
        content = text.encode("utf-8")
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically; an error names the file, and leaves it as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary one, or none
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it; it is renamed first, so that a kill leaves all of it or none."""
    gone = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_removed(parent: Path) -> None:
    """Delete what kills have left of folders in `parent` that were being removed."""
    for left in parent.glob(f".*{REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)


def read_json(path: Path) -> Any:
    """The value of a JSON file; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


class Memory:
    """Hashes of files, and values that were worked out from them, remembered from one run to the next.

    A file is read again only where its path, size, time of change or inode is another than before.
    """

    def __init__(self, remembered: Any = None) -> None:
        files, values = (
            remembered.get(name) if isinstance(remembered, dict) else None for name in ("files", "values")
        )
        self._files: dict[str, list[Any]] = {
            name: entry
            for name, entry in (files.items() if isinstance(files, dict) else ())
            if isinstance(entry, list) and len(entry) == 4
        }
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        """JSON values by a name, which must change with all that they were worked out from."""

    @classmethod
    @contextmanager
    def kept(cls, path: Path) -> Iterator[Memory]:
        """What the file `path` remembers; written back at the end, also after an error, without files that are gone."""
        memory = cls(read_json(path))
        try:
            yield memory
        except BaseException:
            with suppress(OSError, CdmError):  # what went wrong first is told
                memory._keep(path)
            raise
        memory._keep(path)

    def _keep(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {name: entry for name, entry in self._files.items() if Path(name).is_file()}
        write_json(path, {"files": files, "values": self.values})

    def sha256(self, path: Path) -> str:
        """As the function of that name; raises OSError if the file cannot be read."""
        name, status = str(path.absolute()), path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._files.get(name)
        if known is not None and known[:3] == state:
            return str(known[3])
        found = sha256(path)
        if time.time() - status.st_mtime > SETTLED:
            self._files[name] = [*state, found]
        return found

    def folder(self, folder: Path) -> dict[str, str]:
        """SHA-256 of every file below `folder`, by path in it, sorted; links are followed, hidden files left out."""
        return {path.relative_to(folder).as_posix(): self.sha256(path) for path in sorted(_shown_files(folder))}


def _shown_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below a folder, also behind links, but for hidden ones; a link to a folder `above` ends there."""
    here = folder.resolve()
    if here in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _shown_files(path, (*above, here))
        elif path.is_file():
            yield path


def at_home(path: str | Path) -> Path:
    """`path`, in which `~` at the beginning is the home folder."""
    text = str(path)
    return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(path)


def arguments_at_home(arguments: list[str]) -> list[str]:
    """Arguments of a command, with `at_home` for each, and for what stands behind `--option=`."""
    found = [re.fullmatch(r"(--[\w-]+=)?(~|~/.*)", each, re.DOTALL) for each in arguments]
    return [
        each if match is None else f"{match[1] or ''}{at_home(match[2])}"
        for each, match in zip(arguments, found, strict=True)
    ]
