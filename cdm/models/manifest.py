"""The record of the teacher: which model is distilled, with hashes of its files and the facts that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.families.configs import INDEX, read_config
from cdm.models.hub import SUFFIXES, downloaded, resolve, resolved_revision
from cdm.system.files import Memory, digest_of, read_json, sha256, write_json
from cdm.system.progress import track
from cdm.system.provenance import code_digest

LFS_POINTER = b"version https://git-lfs"
"""What a file starts with that Git LFS has not fetched."""


@dataclass(frozen=True)
class TeacherManifest:
    """The record of the model that is distilled: the content of data/teacher.json."""

    family: str
    source: str
    revision: str | None
    """The commit that a hub model was found at; null for a folder."""
    files: dict[str, str]
    """SHA-256 of every file that the model is loaded from, by path."""
    latent_shape: list[int]
    shift: float
    parameters: int
    """Of the transformer."""

    @property
    def digest(self) -> str:
        """Hash of what the model is and of the size at which it draws, wherever it lies."""
        return digest_of([self.family, self.files, self.latent_shape])

    def folder(self) -> Path:
        """The local folder of the model; the hub is asked only for what its cache lacks. Raises CdmError as
        `resolve` does."""
        return self.downloaded() or resolve(self.source, self.revision)

    def downloaded(self) -> Path | None:
        """The folder of a hub model in the hub's cache, if that holds all its files at the recorded commit."""
        folder = None if self.revision is None else downloaded(self.source, self.revision)
        whole = folder is not None and all((folder / name).is_file() for name in self.files)
        return folder if whole else None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TeacherManifest:
        """The manifest at `path`; raises CdmError if the stage `teacher` has not written one there."""
        try:
            return cls(**read_json(path))
        except TypeError:
            raise CdmError(f"{path}: missing or damaged: run the stage `teacher`") from None


def describe(
    family: str,
    source: str,
    revision: str | None,
    resolution: int | None = None,
    recorded: TeacherManifest | None = None,
    memory: Memory | None = None,
) -> TeacherManifest:
    """Find the model, check that it is of the family and draws at `resolution` (pixels; None is its own), and hash
    its files. Raises CdmError.

    A hub model without a `revision` stays at the commit of `recorded`, an earlier manifest of the same source, as
    long as the hub's cache has it. With the `memory` of an earlier run only what has changed is read.
    """
    memory = memory or Memory()
    folder = _pinned(source, revision, recorded) or resolve(source, revision)
    facts = _facts(family, source, folder, resolution, memory)
    check_files(folder)
    return TeacherManifest(
        family=family,
        source=source,
        revision=resolved_revision(folder),
        latent_shape=facts["latent_shape"],
        shift=facts["shift"],
        parameters=facts["parameters"],
        files=file_hashes(folder, memory.sha256),
    )


def _pinned(source: str, revision: str | None, recorded: TeacherManifest | None) -> Path | None:
    """The folder of the commit at which `recorded` found a hub model, if it is what `source` and `revision` mean."""
    if recorded is None or source != recorded.source or Path(source).expanduser().exists():
        return None
    return recorded.downloaded() if revision in (None, recorded.revision) else None


def _facts(family: str, source: str, folder: Path, resolution: int | None, memory: Memory) -> dict[str, Any]:
    """Latent shape, shift and number of parameters of a model.

    They follow from its configs and the family's code: while these stay as they were, `memory` has the answer, and
    neither torch nor diffusers is imported.
    """
    configs = {
        path.relative_to(folder).as_posix(): memory.sha256(path) for path in sorted(folder.rglob("*.json"))
    }
    key = digest_of([family, resolution, configs, code_digest("teacher", family)])
    known: dict[str, Any] = memory.values.get("teacher", {})
    if known.get("key") != key:
        model, found = get_family(family), pipeline_class(folder)
        if found != model.pipeline_class_name:
            raise CdmError(
                f"{source}: a {found}, but the family {family} needs a {model.pipeline_class_name}: check"
                " teacher.family"
            )
        known = memory.values["teacher"] = {
            "key": key,
            "latent_shape": list(model.latent_shape(folder, resolution)),
            "shift": model.shift(folder, resolution),
            "parameters": model.count_parameters(folder),
        }
    return known


def pipeline_class(folder: Path) -> str:
    """Name of the diffusers pipeline that a folder holds."""
    try:
        return str(read_config(folder, INDEX)["_class_name"])
    except (KeyError, TypeError):
        raise CdmError(f"{folder / INDEX}: does not name a diffusers pipeline") from None


def file_hashes(folder: Path, sha256: Callable[[Path], str] = sha256) -> dict[str, str]:
    """SHA-256 of the files in `folder` that a pipeline is loaded from, by path in it, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and "fp16" not in path.name)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in track(paths, "hash", unit="file")}


def check_files(folder: Path) -> None:
    """CdmError that names the part of a pipeline, or the file of its weights, that is missing or damaged."""
    index = read_config(folder, INDEX)
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    for part in parts:
        if not (folder / part).is_dir():
            raise CdmError(f"{folder / part}: missing, though {INDEX} names it: get the model again")
        if part.startswith(("transformer", "text_encoder", "vae")) and not _weights(folder / part):
            raise CdmError(f"{folder / part}: holds no weights in safetensors files, and no others are loaded")
        for path in sorted((folder / part).glob("*.safetensors.index.json")):
            if "fp16" not in path.name:
                _check_shards(path)
        for path in _weights(folder / part):
            _shapes(path)


def _check_shards(index: Path) -> None:
    """CdmError if a file that an index of shards names is not beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CdmError(f"{index}: damaged: get the model again") from None
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise CdmError(f"{index.parent / name}: missing, though {index.name} names it: get the model again")


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a part that are loaded."""
    return [path for path in sorted(folder.glob("*.safetensors")) if "fp16" not in path.name]


def _shapes(path: Path) -> list[list[int]]:
    """Shapes of the tensors in a safetensors file, from its header; CdmError if it is cut off or none."""
    try:
        with safe_open(path, framework="numpy") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        problem = " ".join(str(error).split())
    if path.exists() and _start(path, len(LFS_POINTER)) == LFS_POINTER:
        problem = "a pointer of Git LFS: run `git lfs pull` where it comes from"
    raise CdmError(f"{path}: not a readable safetensors file ({problem})")


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
