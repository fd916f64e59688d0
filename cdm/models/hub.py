"""Finding a model: a diffusers folder on this disk, or a model on a hub, which is downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from cdm.errors import CdmError
from cdm.families.configs import INDEX

SUFFIXES = (".json", ".txt", ".model", ".safetensors")
"""Files that a pipeline is loaded from: configs, vocabularies and weights, but no pickles and no code."""


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` on a hub; it is not where a folder `org` exists, which is then the one meant."""
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


def downloaded(source: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds `source`, whole or not; asks no network.

    `revision` is a branch, tag or commit; None is the main branch.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


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
