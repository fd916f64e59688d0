"""Tables of tensors on disk: safetensors shards beside a manifest with the hash of each.

A store is a folder of `shard-00000.safetensors`, ... and `manifest.json`:
`{"format", "rows", "tensors": {name: {"dtype", "shape"}}, "shards": [{"file", "rows", "sha256"}], "metadata"}`.
Every tensor has one row a sample. The same rows give the same bytes: nothing holds a date.

A store is written in a hidden folder beside its final place, and takes that place when it is whole. So a store
that exists is complete, and what an interrupted run has written survives even where the final folder is removed
before the next run, as DVC does with the outs of a stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.files import read_json, sha256, write_json

MANIFEST = "manifest.json"
RESUME = "resume.json"
FORMAT = "cdm-store-1"


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


def open_staging(out: Path, marker: str, fingerprint: str) -> Path:
    """The hidden folder in which several stores are written that are to take the place `out` together.

    It keeps what an interrupted run of the same `fingerprint` has finished. Raises StoreError if `out` holds
    anything, but no `marker`: then it is not what `publish` would replace.
    """
    if out.exists() and not (out / marker).exists() and not _is_empty(out):
        raise StoreError(f"{out}: exists and holds other things: move it away, or choose another folder")
    staging = _hidden(out)
    if read_json(staging / RESUME) != fingerprint:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_json(staging / RESUME, fingerprint)
    return staging


def publish(out: Path) -> None:
    """Move the staging folder of `out` to its place, where it replaces an older one."""
    staging = _hidden(out)
    (staging / RESUME).unlink()
    if out.exists():
        shutil.rmtree(out)
    staging.replace(out)


class ShardWriter:
    """Writes a store row by row, and takes up an interrupted run where its last whole shard ended.

    `metadata` is what makes rows the same rows (seed, hashes of the inputs): where an interrupted run had
    another, or another `fingerprint` (which is not kept: of the code, say), its shards are dropped. Append from
    row `rows_done` on. As a context manager, it closes on success only.

    Raises StoreError if `folder` holds anything but a store, which the new one would replace.
    """

    def __init__(
        self, folder: Path, rows_per_shard: int, metadata: dict[str, Any], fingerprint: str = ""
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        if folder.exists() and not (folder / MANIFEST).exists() and not _is_empty(folder):
            raise StoreError(f"{folder}: exists and is not a store: move it away, or choose another folder")
        self.folder = folder
        self.rows_per_shard = rows_per_shard
        self.metadata = _plain(metadata)
        self._partial = _hidden(folder)
        self._shards: list[dict[str, Any]] = []
        self._tensors: dict[str, Any] | None = None
        self._buffer: list[dict[str, Tensor]] = []
        self._resume({"rows_per_shard": rows_per_shard, "metadata": self.metadata, "fingerprint": fingerprint})
        self.rows_done = sum(shard["rows"] for shard in self._shards)
        """Rows in whole shards left by an interrupted run."""

    def _resume(self, key: dict[str, Any]) -> None:
        if read_json(self._partial / RESUME) != key:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            write_json(self._partial / RESUME, key)
        while (tensors := self._whole_shard(len(self._shards))) is not None:
            self._tensors = _layout(tensors)
            self._record(self.rows_per_shard)

    def _whole_shard(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of shard `index` if it is there and full; shards are renamed into place when written."""
        path = self._partial / _shard_name(index)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None
        full = all(len(tensor) == self.rows_per_shard for tensor in tensors.values())
        alike = self._tensors is None or _layout(tensors) == self._tensors
        return tensors if full and alike else None

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
        path = self._partial / _shard_name(len(self._shards))
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.replace(path)
        self._record(len(next(iter(tensors.values()))))

    def _record(self, rows: int) -> None:
        name = _shard_name(len(self._shards))
        self._shards.append({"file": name, "rows": rows, "sha256": sha256(self._partial / name)})

    def close(self) -> None:
        """Write the rest and the manifest, and move the store to its place, where it replaces an older one."""
        if self._tensors is None:
            raise ValueError(f"{self.folder}: a store needs at least one row")
        if self._buffer:
            self._flush(whole_shards_only=False)
        manifest = {
            "format": FORMAT,
            "rows": sum(shard["rows"] for shard in self._shards),
            "tensors": self._tensors,
            "shards": self._shards,
            "metadata": self.metadata,
        }
        write_json(self._partial / MANIFEST, manifest)
        self._remove_leftovers()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._partial.replace(self.folder)

    def _remove_leftovers(self) -> None:
        known = {MANIFEST, *(shard["file"] for shard in self._shards)}
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
    """A store to read from. Shards are mapped into memory, so only the rows asked for are read from disk.

    Raises StoreError if `folder` is not a store or its manifest is damaged; see `verify` for the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise StoreError(f"{folder}: no such folder: the stage that writes it has not run")
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StoreError(
                f"{folder / MANIFEST}: missing or damaged: run the stage that writes {folder} again"
            )
        try:
            self.metadata: dict[str, Any] = manifest["metadata"]
            self._tensors: dict[str, Any] = {
                name: {"dtype": layout["dtype"], "shape": list(layout["shape"])}
                for name, layout in manifest["tensors"].items()
            }
            self._shards = [
                (shard["file"], int(shard["rows"]), shard["sha256"]) for shard in manifest["shards"]
            ]
            self._rows = int(manifest["rows"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(f"{folder / MANIFEST}: damaged ({error!r}): run the stage again") from None
        if self._rows != sum(rows for _, rows, _ in self._shards):
            raise StoreError(f"{folder / MANIFEST}: damaged: its shards do not add up to {self._rows} rows")
        self._loaded: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._rows

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._tensors)

    def verify(self) -> None:
        """Hash every shard; StoreError names each that is missing, changed or of another shape."""
        problems = []
        for index, (name, _, digest) in enumerate(self._shards):
            path = self.folder / name
            try:
                if path.exists() and sha256(path) != digest:
                    raise StoreError(
                        f"{path}: its hash differs from the manifest's: the file was changed or damaged"
                    )
                self._shard(index)
            except StoreError as problem:
                problems.append(str(problem))
        if problems:
            raise StoreError("\n".join(problems))

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices`, in that order (repeats allowed), each tensor (len(indices), ...).

        Raises IndexError for an index outside the store, StoreError for a shard that cannot be read.
        """
        wanted = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= self._rows):
            raise IndexError(f"{self.folder}: rows {int(wanted.min())}..{int(wanted.max())} of {self._rows}")
        result = {
            name: torch.empty(len(wanted), *layout["shape"], dtype=getattr(torch, layout["dtype"]))
            for name, layout in self._tensors.items()
        }
        start = 0
        for index, (_, rows, _) in enumerate(self._shards):
            inside = torch.nonzero((wanted >= start) & (wanted < start + rows))[:, 0]
            if len(inside):
                for name, tensor in self._shard(index).items():
                    result[name][inside] = tensor[wanted[inside] - start]
            start += rows
        return result

    def all(self) -> dict[str, Tensor]:
        """Every row of every tensor."""
        return self.rows(range(self._rows))

    def _shard(self, index: int) -> dict[str, Tensor]:
        """The mapped tensors of a shard, checked against the manifest."""
        if index not in self._loaded:
            name, rows, _ = self._shards[index]
            tensors = _load_shard(self.folder / name)
            if _layout(tensors) != self._tensors or any(len(tensor) != rows for tensor in tensors.values()):
                found = {key: list(tensor.shape) for key, tensor in tensors.items()}
                raise StoreError(
                    f"{self.folder / name}: shapes {found} are not the manifest's ({rows} rows of {self._tensors})"
                )
            self._loaded[index] = tensors
        return self._loaded[index]


def is_complete(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether `folder` is a whole store with this metadata."""
    manifest = read_json(folder / MANIFEST)
    return isinstance(manifest, dict) and manifest.get("metadata") == _plain(metadata)


def _load_shard(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise StoreError(f"{path}: missing: run the stage that writes {path.parent} again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back, so that written and read metadata compare equal."""
    return json.loads(json.dumps(value))


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
