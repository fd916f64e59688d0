"""Queries to Git about files: None or False where there is no repository, or Git is not installed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(folder: Path) -> str | None:
    """The commit that `folder` stands at, or None where it is in no repository (or one without a commit)."""
    found = _git(folder, "rev-parse", "HEAD")
    return found.strip() if found is not None else None


def is_clean(folder: Path) -> bool:
    """Whether the working tree around `folder` is that of its commit; files that Git does not know do not count."""
    return _git(folder, "status", "--porcelain", "--untracked-files=no") == ""


def holds(path: Path) -> bool:
    """Whether a commit holds `path` just as it is now, so that nothing is lost where it is overwritten."""
    tracked = _git(path.parent, "ls-files", "--error-unmatch", "--", path.name) is not None
    return tracked and _git(path.parent, "status", "--porcelain", "--", path.name) == ""


def differing(folder: Path) -> list[str]:
    """Files around `folder` that differ from the commit, by path in the repository, sorted; files that Git does not
    know do not count."""
    found = _git(folder, "status", "--porcelain", "--untracked-files=no", "--no-renames", "-z") or ""
    return sorted(entry[3:] for entry in found.split("\0") if entry)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, run in `folder`; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, check=False, text=True, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
