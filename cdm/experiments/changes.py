"""What was changed between two revisions: parameters, and the code that shapes a result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cdm.experiments.revisions import Revision

PARAMS, LOCK = "params.yaml", "dvc.lock"
MISSING = "(none)"
CODE = (".py", ".j2")
"""Ends of the names of dependencies that are code."""
NAMED = 3
"""Changed files of code that are named; of more than one beyond, the number is told."""


@dataclass(frozen=True)
class Change:
    """A parameter and its two values, as YAML has them, or a file of code, which has none."""

    key: str
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        """In a few words."""
        return f"{self.key} {self.before} → {self.after}" if self.after else f"{self.key} (code)"


def changes(revision: Revision, baseline: Revision) -> list[Change]:
    """The parameters that differ, in the order of the params file, and then the first files of code that do.

    Code counts as of the last run, which dvc.lock records.
    """
    before, after = parameters(baseline), parameters(revision)
    found = [
        Change(key, before.get(key, MISSING), after.get(key, MISSING))
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    was, now = _code(baseline), _code(revision)
    files = [path for path in sorted(was.keys() & now.keys()) if was[path] != now[path]]
    if len(files) > NAMED + 1:
        files[NAMED:] = [f"{len(files) - NAMED} more files"]
    return found + [Change(path) for path in files]


def brief(key: str, keys: Iterable[str]) -> str:
    """The shortest end of a dotted key that no other of `keys` has, with the name of its group where that lies deep:
    `max_len` of `schedule.max_len`, and `ca.scale` of `distill.losses.ca.scale`."""
    parts, every = key.split("."), [f".{other}" for other in keys]
    least = 1 if len(parts) < 3 else 2
    ends = [".".join(parts[-length:]) for length in range(least, len(parts))]
    return next((end for end in ends if sum(other.endswith(f".{end}") for other in every) <= 1), key)


def parameters(revision: Revision) -> dict[str, str]:
    """Values by dotted key, as YAML has them in a line; a list is one value."""
    return {key: _inline(value) for key, value in _flat(_yaml(revision, PARAMS))}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _inline(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _code(revision: Revision) -> dict[str, str]:
    """Hashes of the files of code that the stages of the last run depended on, by path."""
    try:
        return {
            dep["path"]: dep["md5"]
            for stage in _yaml(revision, LOCK).get("stages", {}).values()
            for dep in stage.get("deps", [])
            if dep["path"].endswith(CODE)
        }
    except (AttributeError, KeyError, TypeError):  # damaged: DVC says so itself
        return {}


def _yaml(revision: Revision, path: str) -> Mapping[str, Any]:
    """The content of a YAML file; nothing where it is missing or damaged."""
    try:
        found = YAML(typ="safe").load(revision.read(path) or "")
    except (YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}
