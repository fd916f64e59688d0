"""Places that a command is to write to, checked before it begins: hours of work are not to end at a file that is in the
way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from cdm.errors import CdmError
from cdm.system.lock import outs_of


def check_folder(path: Path) -> None:
    """Raises CdmError if no folder can be made at `path`, or nothing be written to the one that is there."""
    _check(path, path)


def check_file(path: Path) -> None:
    """Raises CdmError if no file can be written at `path`."""
    if path.is_dir():
        raise CdmError(f"{path}: a folder, where a file is to be written: move it away, or give another name")
    _check(path, path.parent)


def check_is_nobodys(path: Path, marks: Sequence[str] = ()) -> None:
    """Raises CdmError if `path` lies in something that is to stay as it was written.

    That is what a stage of DVC writes, and a folder that holds a file called as one of `marks` are.
    """
    # As it is written, and where links lead: DVC may have put a link to its cache there.
    for place in (Path(os.path.abspath(path)), path.resolve()):  # noqa: PTH100 - a link is not followed
        for folder in place.parents:
            found = next((out for out in outs(folder / "dvc.yaml") if place.is_relative_to(folder / out)), None)
            if found is not None:
                raise CdmError(
                    f"{path}: lies in {found}, which a stage of the pipeline writes: DVC would take that for changed."
                    " Give another place"
                )
        for folder in place.parents:
            if any((folder / mark).is_file() for mark in marks):
                raise CdmError(f"{path}: lies in {folder}, which is a model: give another place")


def outs(pipeline: Path) -> Iterator[str]:
    """The paths that the stages of a dvc.yaml write, relative to its folder; none where there is no such file."""
    try:
        stages = YAML(typ="safe").load(pipeline.read_text(encoding="utf-8"))["stages"]
        for stage in stages.values():
            yield from outs_of(stage)
    except Exception:  # noqa: BLE001 - of another project, or damaged: DVC says so itself
        return


def _check(path: Path, folder: Path) -> None:
    if path.name in ("", ".."):
        raise CdmError(f"{path}: has no name of its own: give a path that ends in one")
    there = next(each for each in [folder, *folder.parents] if each.exists() or each.is_symlink())
    if not there.is_dir():
        raise CdmError(
            f"{there}: a file is in the way of a folder of this name: move it away, and run it again"
        )
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise CdmError(f"{there}: this user may not write there: change its permissions, or name another place")
