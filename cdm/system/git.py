"""Questions to Git, and a commit: None, False or nothing where there is no repository, or Git is not installed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def commit(folder: Path, revision: str = "HEAD") -> str | None:
    """The commit that `revision` names (HEAD is that which `folder` stands at), or None where it names none, or the
    folder is in no repository, or in one without a commit."""
    found = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    return found.strip() if found is not None else None


def branch(folder: Path) -> str | None:
    """The branch that `folder` is on; None where it is on none."""
    found = _git(folder, "symbolic-ref", "--short", "--quiet", "HEAD")
    return found.strip() if found is not None else None


def references(folder: Path, pattern: str) -> list[tuple[str, str]]:
    """Names and commits of the references that match `pattern`, from the oldest commit to the newest."""
    form = "--format=%(refname) %(objectname)"
    found = _git(folder, "for-each-ref", "--sort=committerdate", form, pattern) or ""
    return [(name, commit) for name, commit in (line.split() for line in found.splitlines())]


def show(folder: Path, revision: str, path: str) -> str | None:
    """The text of a file at a revision, by its path in `folder`; None where there is none."""
    return _git(folder, "show", f"{revision}:./{path}")


@dataclass(frozen=True)
class Changed:
    """A file that differs from the commit, by its path in the folder that was asked about."""

    path: str
    known: bool
    """Whether Git knows it; a new file it does not."""


def changed(folder: Path) -> list[Changed] | None:
    """The files in `folder` that differ from the commit, staged or not; None where there is no repository."""
    prefix = _git(folder, "rev-parse", "--show-prefix")
    found = _status(folder, "--untracked-files=all", "--", ".")
    if prefix is None or found is None:
        return None
    return [Changed(entry[3:].removeprefix(prefix.strip()), not entry.startswith("??")) for entry in found]


def commit_files(folder: Path, message: str, paths: Sequence[str]) -> str:
    """Commit these files and folders as they are now, and nothing else; returns what Git says if it refuses."""
    for arguments in (["add", "--", *paths], ["commit", "--quiet", "--message", message, "--", *paths]):
        done = subprocess.run(["git", *arguments], cwd=folder, check=False, text=True, capture_output=True)
        if done.returncode:
            return " ".join((done.stderr or done.stdout).split())
    return ""


def restore_deleted(folder: Path, paths: Sequence[str]) -> None:
    """Bring back those files at or below `paths`, in `folder`, that Git knows and that are gone; no others change."""
    deleted = _git(folder, "ls-files", "--deleted", "-z", "--", *paths)
    if deleted:
        _git(folder, "checkout", "--quiet", "--", *deleted.removesuffix("\0").split("\0"))


def is_clean(folder: Path) -> bool:
    """Whether the working tree around `folder` is that of its commit; files that Git does not know do not count."""
    return _status(folder, "--untracked-files=no") == []


def holds(path: Path) -> bool:
    """Whether a commit holds `path` just as it is now, so that nothing is lost where it is overwritten."""
    tracked = _git(path.parent, "ls-files", "--error-unmatch", "--", path.name) is not None
    return tracked and _git(path.parent, "status", "--porcelain", "--", path.name) == ""


def differing(folder: Path) -> list[str]:
    """Files around `folder` that differ from the commit, by path in the repository, sorted; files that Git does not
    know do not count."""
    return sorted(entry[3:] for entry in _status(folder, "--untracked-files=no") or [])


def _status(folder: Path, *arguments: str) -> list[str] | None:
    """What differs from the commit, as Git's short form has it: two letters, a space and the path in the repository."""
    found = _git(folder, "status", "--porcelain", "-z", "--no-renames", *arguments)
    return None if found is None else [entry for entry in found.split("\0") if entry]


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, run in `folder`; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, check=False, text=True, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
