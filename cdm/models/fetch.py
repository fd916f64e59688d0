"""Getting the models of the measures from a hub, or from the address where they are published, with hashes checked.

What is there already is not fetched again, and a download that was interrupted goes on. A file whose hash is not the
one of `cdm.models.published`, or of the first time that it was fetched, is deleted and refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cdm.errors import CdmError
from cdm.measures import MODELS, load
from cdm.models.hub import is_hub_id, resolved_revision, told
from cdm.models.metric_models import is_fetched, model_problem, users
from cdm.models.published import (
    File,
    default_place,
    files_of,
    lock_of,
    published_hashes,
    read_lock,
    revision_of,
)
from cdm.params import Evaluate
from cdm.system.files import sha256, write_json

PATTERNS = ("*.json", "*.txt", "*.safetensors")
"""Files of a hub's model that the table of published ones does not have."""
PIECE = 2**20
"""Bytes of a download that are read at once."""
PATIENCE = 60.0
"""Seconds without a byte after which a download is given up."""


def fetch(evaluate: Evaluate) -> Iterator[str]:
    """Gets what the chosen measures need, one model after the other, and yields a line on each.

    Raises CdmError where one cannot be got, or is another than it should be.
    """
    for key in users(evaluate):
        source: str | None = getattr(evaluate.models, key)
        name, _, revision = (source or "").partition("@")
        if is_hub_id(name):
            folder = _from_hub(name, revision or revision_of(name), None)
            if problem := model_problem(key, str(folder)):
                raise CdmError(f"evaluate.models.{key}: {source}: {problem}")
            yield f"{key}: {name} at {resolved_revision(folder)}: {_checked(folder, published_hashes(name))}"
        else:
            yield f"{key}: {_at(key, source)}"


def _at(key: str, source: str | None) -> str:
    """Gets the model of the field `key` to the path `source`, or where a model goes that is not named."""
    target = default_place(key) if source is None else Path(source)
    if not is_fetched(key, source):
        if problem := model_problem(key, source):
            raise CdmError(
                f"evaluate.models.{key}: {source}: {problem}, and it is published nowhere that is known"
            )
        return f"{target}: here, and yours"
    files = files_of(key)
    hashes = {file.name: file.sha256 for file in files if file.sha256}
    if not model_problem(key, source):
        if source is not None and not lock_of(target).exists():
            return f"{target}: here, and yours"
    elif MODELS[key].converter is not None:
        _convert(key, files, target)
    else:
        for file in files:
            _download(file, target / file.name if MODELS[key].files else target)
    return f"{target}: {_checked(target, hashes, delete=source is None)}"


def _convert(key: str, files: Iterable[File], target: Path) -> None:
    """Makes the folder `target` of what a hub has."""
    found: dict[str, Path] = {}
    places: dict[str, list[File]] = {}
    for file in files:
        places.setdefault(file.place, []).append(file)
    for place, parts in places.items():
        folder = _from_hub(place, parts[0].revision, [file.name for file in parts])
        _checked(folder, published_hashes(place))
        found |= {file.name: folder / file.name for file in parts if (folder / file.name).exists()}
    target.parent.mkdir(parents=True, exist_ok=True)
    load(MODELS[key].converter or "")(found, target)
    lock_of(target).unlink(missing_ok=True)


def _from_hub(name: str, revision: str | None, names: list[str] | None) -> Path:
    """The folder in the hub's cache with these files of a model, or with those that a model has."""
    from huggingface_hub import snapshot_download

    known = list(published_hashes(name, every=True)) if revision == revision_of(name) else []
    with told(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=names or known or list(PATTERNS)))


def _download(file: File, target: Path) -> None:
    """Gets a file from its address, if it is not there; one that was broken off goes on where it ended."""
    if target.is_file() and sha256(target) == file.sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    begun = part.stat().st_size if part.exists() else 0
    request = Request(file.place, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        try:
            answer = urlopen(request, timeout=PATIENCE)
        except HTTPError as error:
            if error.code != 416:  # it was all there, or is another file by now
                raise
            part.unlink()
            answer = urlopen(file.place, timeout=PATIENCE)
        with answer, part.open("ab" if answer.status == 206 else "wb") as out:
            shutil.copyfileobj(answer, out, PIECE)
            if answer.length:  # bytes that did not come
                raise HTTPException("the connection ended early")
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise CdmError(f"{file.place}: could not be downloaded: {reason}: the same command goes on") from None
    found = sha256(part)
    if found != file.sha256:
        part.unlink()
        raise CdmError(f"{file.place}: {_differs(file.name, found, file.sha256 or '')}")
    part.rename(target)


def _checked(path: Path, published: Mapping[str, str], *, delete: bool = True) -> str:
    """Checks the hashes of a file, or of every file in a folder, against those that are `published`, and the others
    against those that were recorded at first; says how many there are. Raises CdmError for another file, which it
    may `delete`."""
    lock = lock_of(path)
    recorded = read_lock(path)
    new, total = [], 0
    names = sorted(each.name for each in path.iterdir() if each.is_file()) if path.is_dir() else [path.name]
    for name in names:
        file = path / name if path.is_dir() else path
        found, expected = sha256(file), published.get(name) or recorded.get(name)
        total += file.stat().st_size
        if expected is None:
            new.append(name)
            recorded[name] = found
        elif found != expected:
            if delete:
                file.resolve().unlink()  # in a hub's cache it is a link
                file.unlink(missing_ok=True)
            raise CdmError(f"{path}: {_differs(name, found, expected, delete=delete)}")
    if new:
        write_json(lock, recorded)
    said = f"{len(names)} files, {total / 1e6:,.1f} MB" if path.is_dir() else f"{total / 1e6:,.1f} MB"
    if not new:
        return f"{said}, hashes as they should be"
    return f"{said}, hashes recorded in {lock} of {', '.join(new)}"


def _differs(name: str, found: str, expected: str, *, delete: bool = True) -> str:
    remedy = (
        "it was deleted; fetch it again"
        if delete
        else "remove it and fetch it again, or name your own elsewhere"
    )
    return f"{name} has the SHA-256 {found[:16]}... instead of {expected[:16]}...: {remedy}"
