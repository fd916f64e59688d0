"""What a run of the pipeline leaves, and whether it has anything to do, told from DVC's files alone, in a moment and
within a stage.

`dvc status` knows more, but takes seconds to start, and a stage that runs holds DVC's lock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

RESULTS = ("dvc.lock", "metrics", "plots", "logs/distill.csv")
"""What a run of the pipeline changes in Git: files, and folders with all that is in them."""


def is_result(path: str) -> bool:
    """Whether the pipeline itself writes the file at `path`, in the repository."""
    return any(Path(path).is_relative_to(result) for result in RESULTS)


def is_unchanged(folder: Path = Path(), asked: str = "teacher") -> bool:
    """Whether commands, parameters, code and inputs of all stages are those that dvc.lock has recorded, and all that
    they wrote is there.

    Inputs that another stage writes count as recorded; the files of the stage `asked`, which always runs, are read.
    Where it cannot be told, the answer is no.
    """
    try:
        pipeline, lock = (_load(folder / name)["stages"] for name in ("dvc.yaml", "dvc.lock"))
        params = _load(folder / "params.yaml")
        written = {
            out["path"]: out["md5"]
            for name, stage in lock.items()
            for out in stage.get("outs", [])
            if name != asked
        }
        return all(_is_recorded(stage, lock[name], params, written, folder) for name, stage in pipeline.items())
    except (OSError, YAMLError, KeyError, TypeError):
        return False


def is_cached(path: Path, cache: Path, folder: Path = Path()) -> bool:
    """Whether dvc.lock has recorded a file, in a folder that a stage wrote, as it is now, and `cache`, DVC's folder of
    files by their hashes, holds all of that folder.

    `path` is relative to `folder`, the repository. Where it cannot be told, the answer is no.
    """
    try:
        stages = _load(folder / "dvc.lock")["stages"].values()
        written = {Path(out["path"]): out["md5"] for stage in stages for out in stage.get("outs", [])}
        listing = json.loads(_cached(cache, written[path.parent]).read_text(encoding="utf-8"))
        files = {entry["relpath"]: entry["md5"] for entry in listing}
        recorded = files[path.name] == _md5(folder / path)
        return recorded and all(_cached(cache, md5).is_file() for md5 in files.values())
    except (OSError, YAMLError, ValueError, KeyError, TypeError):
        return False


def _cached(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _is_recorded(
    stage: Mapping[str, Any],
    locked: Mapping[str, Any],
    params: Mapping[str, Any],
    written: Mapping[str, str],
    folder: Path,
) -> bool:
    """Whether a stage is as dvc.lock has it; `written` are hashes of what other stages write, by path."""
    recorded = {dep["path"]: dep["md5"] for dep in locked.get("deps", [])}
    deps = [_filled(dep, params) for dep in stage.get("deps", [])]
    values: Mapping[str, Any] = locked.get("params", {}).get("params.yaml", {})
    return (
        stage["cmd"] == locked["cmd"]
        and set(deps) == recorded.keys()
        and {key: _value(params, key) for key in stage.get("params", [])} == values
        and all(recorded[dep] == (written.get(dep) or _md5(folder / dep)) for dep in deps)
        and set(outs_of(stage)) == {out["path"] for out in locked.get("outs", [])}
        and all((folder / path).exists() for path in outs_of(stage))
    )


def outs_of(stage: Mapping[str, Any]) -> Iterator[str]:
    """The paths that a stage writes, as dvc.yaml has them."""
    for kind in ("outs", "metrics", "plots"):
        for entry in stage.get(kind, []):
            yield from [entry] if isinstance(entry, str) else entry


def _filled(text: str, params: Mapping[str, Any]) -> str:
    """`text` with the parameters in it that DVC fills in, as `${teacher.family}`."""
    return re.sub(r"\$\{([^}]+)\}", lambda found: str(_value(params, found[1])), text)


def _value(params: Mapping[str, Any], key: str) -> Any:
    return reduce(lambda inside, name: inside[name], key.split("."), params)


def _md5(path: Path) -> str:
    """The hash that DVC has of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
