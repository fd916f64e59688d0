"""The version of the package, and the commit of the clone that it is run from."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from cdm.system import git

ROOT = Path(__file__).parents[2]
"""The clone, where the package is run from one."""
SHOWN = 12
"""Characters of a commit that are shown."""


def version() -> str:
    """The version of the package: in a clone that of pyproject.toml, which an installation may be behind."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "cdm":
            return str(project["version"])
    except (OSError, KeyError, ValueError):
        pass
    return metadata.version("cdm")


def describe() -> str:
    """The version, and in a clone the commit and whether files differ from it."""
    commit = git.commit(ROOT) if (ROOT / ".git").exists() else None
    if commit is None:
        return version()
    changes = "" if git.is_clean(ROOT) else ", with changes"
    return f"{version()} (commit {commit[:SHOWN]}{changes})"
