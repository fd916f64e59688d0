"""Finding a model: a diffusers folder on this disk, or a model on a hub, which is downloaded once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdm.errors import CdmError
from cdm.families.configs import INDEX
from cdm.families.folder import SMALL, TEMPLATES, is_model, parts, plain_index, plain_weights, variant_patterns
from cdm.system.files import at_home


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` on a hub; it is not where a folder `org` exists, which is then the one meant."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def resolve(source: str, revision: str | None = None) -> Path:
    """The local diffusers folder of `source`, a folder or a hub id `org/name`; a hub model is downloaded once.

    `revision` is a branch, tag or commit of a hub id. Raises CdmError in one line where there is no such folder
    or model, it is not a diffusers pipeline, or the hub cannot be reached or refuses access.
    """
    path = at_home(source)
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
    except errors.LocalEntryNotFoundError as error:  # or one that is not whole, as far as the cache knows
        folder: str | None = getattr(error, "snapshot_path", None)
        return None if folder is None else Path(folder)
    except errors.HFValidationError:
        return None


def _checked(folder: Path) -> Path:
    if not (folder / INDEX).is_file():
        raise CdmError(f"{folder}: not a diffusers folder: it has no {INDEX}")
    return folder


def _download(source: str, revision: str | None) -> Path:
    with told(source, revision):
        return _fetch(source, revision)


@contextmanager
def told(source: str, revision: str | None) -> Iterator[None]:
    """Errors of a download of `source` from the hub as a CdmError of one line."""
    from huggingface_hub import errors

    name = f"{source}@{revision}" if revision else source
    try:
        yield
        return
    except errors.GatedRepoError:
        problem = f"gated: ask for access on https://huggingface.co/{source}, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
    except errors.RevisionNotFoundError:
        problem = "the model has no such revision: check the revision"
    except errors.LocalEntryNotFoundError:
        problem = (
            "no folder here, not downloaded before, and the hub cannot be reached (see also HF_HUB_OFFLINE)"
        )
    except errors.HFValidationError as error:
        problem = f"not a valid hub id: {error}"
    except OSError as error:  # HTTP errors of every kind, and a full disk
        problem = f"could not be downloaded: {error}"
    raise CdmError(f"{name}: {' '.join(problem.split())}")


def _fetch(source: str, revision: str | None) -> Path:
    """Downloads the files of a pipeline, and no others, as `cdm.families.folder` has them: what says which they are
    comes first. Errors are huggingface_hub's, and CdmError for an index that is damaged.
    """
    from huggingface_hub import snapshot_download

    def get(patterns: list[str], ignored: list[str] | None = None) -> Path:
        wanted = revision if folder is None else folder.name  # the commit of the first call
        return Path(
            snapshot_download(source, revision=wanted, allow_patterns=patterns, ignore_patterns=ignored)
        )

    folder: Path | None = None
    folder = get([INDEX])
    if not (folder / INDEX).is_file():
        return folder
    named = parts(folder)
    small = [f"{part}/*{suffix}" for part in named for suffix in SMALL]
    inside = [f"*/*/*{suffix}" for suffix in SMALL if suffix != ".jinja"]
    templates = [f"{part}/{TEMPLATES}/*.jinja" for part in named]
    get([INDEX, *small, *templates], ["*.index.json", "*.index.*.json", *inside])
    models = {part: library for part, (library, _) in named.items() if is_model(folder, part, library)}
    get([INDEX, *(f"{part}/{plain_index(library)}" for part, library in models.items())])
    plain = {part: plain_weights(folder, part, library) for part, library in models.items()}
    get([INDEX, *(f"{part}/{name}" for part, names in plain.items() for name in names)])
    absent = [
        part for part, names in plain.items() if not any((folder / part / name).is_file() for name in names)
    ]
    if absent:
        patterns = {part: variant_patterns(models[part]) for part in absent}
        get([INDEX, *(f"{part}/{pattern}" for part, each in patterns.items() for pattern in each)])
    return folder
