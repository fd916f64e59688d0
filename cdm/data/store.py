"""Tables of tensors on disk: safetensors shards beside a manifest with the hash of each.

A store is a folder of `shard-00000.safetensors`, ... and `manifest.json`:
`{"format", "rows", "tensors": {name: {"dtype", "shape"}}, "shards": [{"file", "rows", "sha256"}], "metadata"}`.
Every tensor has one row a sample. The same rows give the same bytes: nothing holds a date.

A store is written in a hidden folder beside its final place, and takes that place when it is whole. So a store
that exists is complete, and what an interrupted run has written survives even where the final folder is removed
before the next run, as DVC does with the outs of a stage.

A shard is hashed when a process reads its first row, so that no damaged number is used, and what is not read costs
nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.files import Memory, read_json, sha256, write_json
from cdm.system.writing import hidden, placed, replace

MANIFEST = "manifest.json"
RESUME = "resume.json"
FORMAT = "cdm-store-1"

_hashes = Memory()
"""Hashes of the shards that this process has read, whichever `Store` has read them."""

Value = TypeVar("Value", int, float, str)
KINDS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
"""What JSON may have for a value of a kind."""


class StoreError(CdmError):
    """A store that is missing, incomplete or damaged; the message names the folder and the file."""


def shard_rows(row_bytes: int, most: int = 256, shard_bytes: int = 2**28) -> int:
    """Rows of a shard of about `shard_bytes`: at most `most`, at least one.

    Independent of batch sizes, so that the batch size of a run does not show in its files.
    """
    return max(1, min(most, shard_bytes // row_bytes))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _layout(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What all rows have in common: dtype and row shape by name, sorted: a file has its tensors in no order."""
    return {
        name: {"dtype": _dtype(tensor), "shape": list(tensor.shape[1:])}
        for name, tensor in sorted(tensors.items())
    }


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """A file of a store."""

    file: str
    rows: int
    sha256: str


def open_staging(out: Path, marker: str, fingerprint: str) -> Path:
    """The hidden folder in which several stores are written that are to take the place `out` together.

    It keeps what an interrupted run of the same `fingerprint` has finished. Raises StoreError if `out` holds
    anything, but no `marker`: then it is not what `publish` would replace.
    """
    _check_replaceable(out, marker)
    staging = hidden(out)
    if read_json(staging / RESUME) != fingerprint:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_json(staging / RESUME, fingerprint)
    return staging


def publish(out: Path) -> None:
    """Move the staging folder of `out` to its place, where it replaces an older one."""
    staging = hidden(out)
    (staging / RESUME).unlink()
    replace(staging, out)


def make_empty(folder: Path) -> None:
    """An empty folder in the place of a store; StoreError if it holds anything but a store."""
    _check_replaceable(folder, MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _check_replaceable(folder: Path, marker: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder}: a file is in the way: move it away, or choose another folder")
    if any(folder.iterdir()) and not (folder / marker).exists():
        raise StoreError(f"{folder}: exists and holds other things: move it away, or choose another folder")


class ShardWriter:
    """Writes a store row by row, and takes up an interrupted run where its last whole shard ended.

    `metadata` is what makes rows the same rows (seed, hashes of the inputs): where an interrupted run had
    another, or another `fingerprint` (which is not kept: of the code, say), its shards are dropped. So is a shard
    that has changed since it was written, with all behind it. Append from row `rows_done` on. As a context manager,
    it closes on success only.

    Raises StoreError if `folder` holds anything but a store, which the new one would replace.
    """

    def __init__(
        self, folder: Path, rows_per_shard: int, metadata: dict[str, Any], fingerprint: str = ""
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        _check_replaceable(folder, MANIFEST)
        self.folder = folder
        self.rows_per_shard = rows_per_shard
        self.metadata = _plain(metadata)
        self._partial = hidden(folder)
        self._shards: list[Shard] = []
        self._tensors: dict[str, Any] | None = None
        self._buffer: list[dict[str, Tensor]] = []
        self._key = {"rows_per_shard": rows_per_shard, "metadata": self.metadata, "fingerprint": fingerprint}
        self._resume()
        self.rows_done = sum(shard.rows for shard in self._shards)
        """Rows in whole shards left by an interrupted run."""

    def _resume(self) -> None:
        kept = read_json(self._partial / RESUME)
        if not isinstance(kept, dict) or kept.get("key") != self._key:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            kept = {}
        for shard in (Shard(**written) for written in kept.get("shards", [])):
            layout = self._layout_of(shard)
            if layout is None or self._tensors not in (None, layout):
                break
            self._tensors = layout
            self._shards.append(shard)
        self._record()

    def _layout_of(self, shard: Shard) -> dict[str, Any] | None:
        """The layout of a shard that was written before; None if it is not full, or no longer what was written."""
        path = self._partial / shard.file
        if shard.rows != self.rows_per_shard or not path.is_file() or sha256(path) != shard.sha256:
            return None
        return _layout(_load_shard(path))

    def _record(self) -> None:
        """Remember the shards that are written, for a run that takes this one up."""
        shards = [asdict(shard) for shard in self._shards]
        write_json(self._partial / RESUME, {"key": self._key, "shards": shards})

    def append(self, tensors: dict[str, Tensor]) -> None:
        """Add the rows of `tensors`, each (rows, ...) with the same number of rows.

        Raises ValueError if names, dtypes or row shapes differ from those of earlier rows.
        """
        tensors = {name: tensors[name].detach().cpu() for name in sorted(tensors)}
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            raise ValueError(f"tensors of unequal length: { {name: len(t) for name, t in tensors.items()} }")
        if self._tensors is None:
            self._tensors = _layout(tensors)
        if _layout(tensors) != self._tensors:
            raise ValueError(f"rows are {_layout(tensors)}, the store's are {self._tensors}")
        self._buffer.append(tensors)
        if self._buffered() >= self.rows_per_shard:
            self._flush(whole_shards_only=True)

    def _buffered(self) -> int:
        return sum(len(next(iter(tensors.values()))) for tensors in self._buffer)

    def _flush(self, whole_shards_only: bool) -> None:
        rows = {name: torch.cat([part[name] for part in self._buffer]) for name in self._tensors or {}}
        count, start = self._buffered(), 0
        while count - start >= self.rows_per_shard or (start < count and not whole_shards_only):
            stop = min(start + self.rows_per_shard, count)
            # A file has its rows one after the other, however a network has left them in memory.
            whole = torch.contiguous_format
            self._write({name: tensor[start:stop].clone(memory_format=whole) for name, tensor in rows.items()})
            start = stop
        self._buffer = [{name: tensor[start:] for name, tensor in rows.items()}] if start < count else []

    def _write(self, tensors: dict[str, Tensor]) -> None:
        name = _shard_name(len(self._shards))
        with placed(self._partial / name) as path:
            save_file(tensors, path)
            digest = sha256(path)
        self._shards.append(Shard(name, len(next(iter(tensors.values()))), digest))
        self._record()

    def close(self) -> None:
        """Write the rest and the manifest, and move the store to its place, where it replaces an older one."""
        if self._tensors is None:
            raise ValueError(f"{self.folder}: a store needs at least one row")
        if self._buffer:
            self._flush(whole_shards_only=False)
        manifest = {
            "format": FORMAT,
            "rows": sum(shard.rows for shard in self._shards),
            "tensors": self._tensors,
            "shards": [asdict(shard) for shard in self._shards],
            "metadata": self.metadata,
        }
        write_json(self._partial / MANIFEST, manifest)
        self._remove_leftovers()
        replace(self._partial, self.folder)

    def _remove_leftovers(self) -> None:
        known = {MANIFEST, *(shard.file for shard in self._shards)}
        for path in self._partial.iterdir():
            if path.name not in known:
                path.unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


class Store:
    """A store to read from. Shards are mapped into memory, so only the rows asked for are kept there.

    Raises StoreError if `folder` is not a store, its manifest is damaged, or a shard is not there. What is in a shard
    is checked when its first row is read: its hash and its shapes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise StoreError(f"{folder}: no such folder: the stage that writes it has not run")
        manifest = read_json(folder / MANIFEST)
        problem = next(_problems(manifest), None)
        if problem is not None:
            raise StoreError(f"{folder / MANIFEST}: missing or damaged ({problem}): {_remedy(folder)}")
        self.metadata: dict[str, Any] = manifest["metadata"]
        self._tensors: dict[str, Any] = manifest["tensors"]
        self._shards = [Shard(each["file"], each["rows"], each["sha256"]) for each in manifest["shards"]]
        self._rows: int = manifest["rows"]
        self._loaded: dict[int, dict[str, Tensor]] = {}
        for shard in self._shards:
            if not (folder / shard.file).is_file():
                raise StoreError(f"{folder / shard.file}: missing: {_remedy(folder)}")

    def __len__(self) -> int:
        return self._rows

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._tensors)

    def fact(self, name: str, kind: type[Value]) -> Value:
        """The value `name` of `metadata`; StoreError if it is missing or of another kind."""
        value = self.metadata.get(name)
        if not isinstance(value, KINDS[kind]) or isinstance(value, bool):
            raise StoreError(
                f"{self.folder / MANIFEST}: damaged: {name} is {str(value)[:40]!r}, expected {kind.__name__}:"
                f" {_remedy(self.folder)}"
            )
        return kind(self.metadata[name])

    def verify(self) -> None:
        """Check every shard, read or not; StoreError names each that is missing, changed or of another shape."""
        problems = []
        for index in range(len(self._shards)):
            try:
                self._shard(index)
            except StoreError as problem:
                problems.append(str(problem))
        if problems:
            raise StoreError("\n".join(problems))

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices`, in that order (repeats allowed), each tensor (len(indices), ...).

        Raises IndexError for an index outside the store, StoreError for a shard that is damaged.
        """
        wanted = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= self._rows):
            raise IndexError(f"{self.folder}: rows {int(wanted.min())}..{int(wanted.max())} of {self._rows}")
        parts, start = [], 0
        for index, shard in enumerate(self._shards):
            inside = torch.nonzero((wanted >= start) & (wanted < start + shard.rows))[:, 0]
            if len(inside):
                parts.append((inside, wanted[inside] - start, self._shard(index)))
            start += shard.rows
        result = {
            name: torch.empty(len(wanted), *layout["shape"], dtype=getattr(torch, layout["dtype"]))
            for name, layout in self._tensors.items()
        }
        for inside, rows, tensors in parts:
            for name, tensor in tensors.items():
                result[name][inside] = tensor[rows]
        return result

    def all(self) -> dict[str, Tensor]:
        """Every row of every tensor."""
        return self.rows(range(self._rows))

    def _shard(self, index: int) -> dict[str, Tensor]:
        """The mapped tensors of a shard, checked against the manifest when they are asked for first."""
        if index not in self._loaded:
            shard = self._shards[index]
            path = self.folder / shard.file
            if self._hash(path) != shard.sha256:
                raise StoreError(
                    f"{path}: its hash differs from the manifest's: changed or damaged: {_remedy(self.folder)}"
                )
            tensors = _load_shard(path)
            if _layout(tensors) != self._tensors or any(
                len(tensor) != shard.rows for tensor in tensors.values()
            ):
                found = {key: list(tensor.shape) for key, tensor in tensors.items()}
                raise StoreError(
                    f"{path}: shapes {found} are not the manifest's ({shard.rows} rows of {self._tensors})"
                )
            self._loaded[index] = tensors
        return self._loaded[index]

    def _hash(self, path: Path) -> str:
        try:
            return _hashes.sha256(path)
        except FileNotFoundError:
            raise StoreError(f"{path}: missing: {_remedy(self.folder)}") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def is_complete(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether `folder` is a whole store with this metadata; its shards are there, but not read."""
    try:
        return Store(folder).metadata == _plain(metadata)
    except StoreError:
        return False


def _problems(manifest: Any) -> Iterator[str]:
    """What keeps `manifest` from being what a `ShardWriter` writes."""
    match manifest:
        case {
            "format": str(form),
            "rows": int(rows),
            "tensors": dict(tensors),
            "shards": list(shards),
            "metadata": dict(),
        }:
            if form != FORMAT:
                yield f"its format is {form!r}, not {FORMAT}"
            for name, layout in tensors.items():
                if not _is_layout(layout):
                    yield f"tensor {name} has no dtype and shape"
            for shard in shards:
                if not _is_shard(shard):
                    yield "a shard has no file, rows and sha256"
                    return
            if not shards or not tensors or rows != sum(shard["rows"] for shard in shards):
                yield f"its shards do not add up to {rows} rows"
        case _:
            yield "it is no manifest of a store"


def _is_layout(value: Any) -> bool:
    match value:
        case {"dtype": str(dtype), "shape": list(shape)} if len(value) == 2:
            return isinstance(getattr(torch, dtype, None), torch.dtype) and all(
                type(size) is int and size >= 0 for size in shape
            )
    return False


def _is_shard(value: Any) -> bool:
    match value:
        case {"file": str(file), "rows": int(rows), "sha256": str(digest)}:
            return (
                re.fullmatch(r"shard-\d{5,}\.safetensors", file) is not None
                and type(rows) is int
                and rows > 0
                and re.fullmatch(r"[0-9a-f]{64}", digest) is not None
            )
    return False


def _remedy(folder: Path) -> str:
    return f"remove {folder} and run `dvc repro` (or the stage that writes it) again"


def _load_shard(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back, so that written and read metadata compare equal."""
    return json.loads(json.dumps(value))
