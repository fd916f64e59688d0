"""Where the teacher is: a diffusers folder on this disk, or a model on a hub; and the record of which one it is."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.families.common import INDEX, read_config
from cdm.system.progress import track

SUFFIXES = (".json", ".txt", ".model", ".safetensors")
"""Files that a pipeline is loaded from: configs, vocabularies and weights, but no pickles and no code."""
LFS_POINTER = b"version https://git-lfs"
"""What a file starts with that Git LFS has not fetched."""


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` on a hub; where `org` is a folder here, one inside it was meant."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def resolve(source: str, revision: str | None = None) -> Path:
    """The local diffusers folder of `source`, a folder or a hub id `org/name`; a hub model is downloaded once.

    `revision` is a branch, tag or commit of a hub id. Raises CdmError in one line where there is no such folder
    or model, it is not a diffusers pipeline, or the hub cannot be reached or refuses access.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CdmError(
                f"teacher.revision is {revision!r}, but {source} is a folder, which has none: set it to null"
            )
        return _checked(path)
    if path.exists():
        raise CdmError(f"{source}: a file; teacher.source is a diffusers folder or a hub id (org/name)")
    if not is_hub_id(source):
        raise CdmError(f"{source}: no such folder, and not a hub id (org/name): check teacher.source")
    return _checked(_download(source, revision))


def resolved_revision(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None


def _checked(folder: Path) -> Path:
    if not (folder / INDEX).is_file():
        raise CdmError(f"{folder}: not a diffusers folder: it has no {INDEX}")
    return folder


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = f"{source}@{revision}" if revision else source
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=[INDEX, *(f"*/*{suffix}" for suffix in SUFFIXES)],
                ignore_patterns=["*fp16*"],
            )
        )
    except errors.GatedRepoError:
        problem = f"gated: ask for access on https://huggingface.co/{source}, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
    except errors.RevisionNotFoundError:
        problem = "the model has no such revision: check teacher.revision"
    except errors.LocalEntryNotFoundError:
        problem = (
            "no folder here, not downloaded before, and the hub cannot be reached (see also HF_HUB_OFFLINE)"
        )
    except errors.HFValidationError as error:
        problem = f"not a valid hub id: {error}"
    except OSError as error:  # HTTP errors of every kind, and a full disk
        problem = f"could not be downloaded: {error}"
    raise CdmError(f"{name}: {' '.join(problem.split())}")


@dataclass(frozen=True)
class TeacherManifest:
    """Which model the pipeline distils: the content of data/teacher.json."""

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
        from cdm.data.store import digest_of  # needs torch, which the check of a params file does without

        return digest_of([self.family, self.files, self.latent_shape])

    def folder(self) -> Path:
        """The local folder of the model; raises CdmError as `resolve` does."""
        return resolve(self.source, self.revision)

    def write(self, path: Path) -> None:
        from cdm.data.store import write_json

        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TeacherManifest:
        """The manifest at `path`; raises CdmError if the stage `teacher` has not written one there."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise CdmError(f"{path}: missing or damaged: run the stage `teacher`") from None


def describe(family: str, source: str, revision: str | None, resolution: int | None = None) -> TeacherManifest:
    """Find the model, check that it is of the family and draws at `resolution` (pixels; None is its own), and hash
    its files. Raises CdmError."""
    model, folder = get_family(family), resolve(source, revision)
    found = pipeline_class(folder)
    if found != model.pipeline_class_name:
        raise CdmError(
            f"{source}: a {found}, but the family {family} needs a {model.pipeline_class_name}: check teacher.family"
        )
    check_files(folder)
    return TeacherManifest(
        family=family,
        source=source,
        revision=resolved_revision(folder),
        latent_shape=list(model.latent_shape(folder, resolution)),
        shift=model.shift(folder, resolution),
        parameters=model.count_parameters(folder),
        files=file_hashes(folder),
    )


def pipeline_class(folder: Path) -> str:
    """Name of the diffusers pipeline that a folder holds."""
    try:
        return str(read_config(folder, INDEX)["_class_name"])
    except (KeyError, TypeError):
        raise CdmError(f"{folder / INDEX}: does not name a diffusers pipeline") from None


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in `folder` that a pipeline is loaded from, by path in it, sorted."""
    from cdm.data.store import sha256

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
        with safe_open(path, framework="pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        problem = " ".join(str(error).split())
    if path.exists() and _start(path, len(LFS_POINTER)) == LFS_POINTER:
        problem = "a pointer of Git LFS: run `git lfs pull` where it comes from"
    raise CdmError(f"{path}: not a readable safetensors file ({problem})")


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
