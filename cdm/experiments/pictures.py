"""The pictures that the stage `sample` leaves of each experiment: from the working tree, or from DVC's cache.

DVC fetches what its cache lacks from the project's remote, if it has one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdm.experiments.figures import Results
from cdm.system.files import read_json

SAMPLES = "data/samples"
NAME = re.compile(r"(\d+)-(student|teacher)-steps(\d+)\.png")
"""Of the first sample of a prompt: its number, the model and the number of steps."""


@dataclass(frozen=True)
class Place:
    """Where a picture belongs in a comparison."""

    prompt: int
    model: str
    steps: int


@dataclass(frozen=True)
class Pictures:
    """PNGs of an experiment by place, or why there are none."""

    png: dict[Place, bytes] = field(repr=False, default_factory=dict)
    problem: str = ""


def pictures_of(results: Results) -> Pictures:
    """The pictures of the samples that the figures of `results` are of."""
    folder, commit = results.revision.folder, results.revision.commit
    if commit is None:
        return _of_working_tree(results, folder / SAMPLES)
    from dvc.api import DVCFileSystem

    try:
        files = DVCFileSystem(url=str(folder.absolute()), rev=commit)
        found = dict(_read(files, f"{SAMPLES}/pictures"))
        reason = "none there"
    except Exception as error:  # noqa: BLE001 - a cache or a remote that lacks something fails in many ways
        found, reason = {}, " ".join(str(error).split()) or type(error).__name__
    if found:
        return Pictures(found)
    return Pictures(
        problem=f"no pictures: DVC's cache lacks {SAMPLES} of it; dvc pull may have them ({reason})"
    )


def _of_working_tree(results: Results, folder: Path) -> Pictures:
    found = {
        _place(match): path.read_bytes()
        for path in sorted((folder / "pictures").glob("*.png"))
        if (match := NAME.fullmatch(path.name))
    }
    steps = results.steps("student")[0]
    drawn: dict[str, Any] = (read_json(folder / f"student/steps{steps}/manifest.json") or {}).get(
        "metadata", {}
    )
    if not found:
        return Pictures(problem=f"no pictures: {folder} is not there (dvc checkout)")
    if results.basis is not None and drawn.get("model") != results.basis["student"]:
        return Pictures(problem=f"no pictures: {folder} is of another student than its figures")
    return Pictures(found)


def _read(files: Any, folder: str) -> Iterator[tuple[Place, bytes]]:
    """The pictures in a folder of DVC's file system."""
    for path in sorted(files.find(folder)):
        match = NAME.fullmatch(Path(path).name)
        if match:
            with files.open(path, "rb") as file:
                yield _place(match), file.read()


def _place(match: re.Match[str]) -> Place:
    return Place(int(match[1]), match[2], int(match[3]))


def prompt_of(png: bytes) -> str:
    """The prompt that a picture was drawn for, which its metadata say."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return str(image.info.get("prompt", ""))


def shown(png: bytes, most: int = 384) -> bytes:
    """The picture as it is, or as a JPEG of `most` pixels a side if it is larger, so that a page stays small."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        if max(image.size) <= most:
            return png
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=90)
        return buffer.getvalue()
