"""Experiments and revisions, and the small files of each, through Git alone: DVC keeps every experiment as a commit.

An experiment NAME of the commit SHA is the reference refs/exps/SHA[:2]/SHA[2:]/NAME. DVC itself, which takes seconds to
import, is needed only for what it caches (`cdm.experiments.pictures`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdm.errors import CdmError
from cdm.system import git

WORKSPACE = "workspace"
SHORT = 7
"""Digits of a commit that are shown."""


@dataclass(frozen=True)
class Revision:
    """A state of the repository in `folder`: a commit, or where that is None the working tree."""

    name: str
    """What tables call it: the experiment, the branch, or what it was asked for by."""
    commit: str | None
    folder: Path = Path()

    def read(self, path: str) -> str | None:
        """The text of a file in Git, or in the working tree; None where it is missing."""
        if self.commit is not None:
            return git.show(self.folder, self.commit, path)
        try:
            return (self.folder / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    @property
    def title(self) -> str:
        """The name with the commit, where the name does not say it."""
        known = self.commit is None or self.commit.startswith(self.name)
        return self.name if known else f"{self.name} ({self.commit[:SHORT] if self.commit else ''})"


@dataclass(frozen=True)
class Reference:
    """An experiment of DVC: its name, its own commit, and the commit that it was run on."""

    name: str
    commit: str
    baseline: str


def find(names: Sequence[str], folder: Path = Path()) -> list[Revision]:
    """The revisions that are to be compared, the first being what the others are compared with.

    `names` are experiments of DVC, revisions of Git, or `workspace`. Without any: the current commit, its experiments
    from the oldest to the newest, and the working tree. With a single one: the current commit and that. Raises CdmError
    where the folder is in no repository, or a name is unknown or that of several experiments.
    """
    head = git.commit(folder)
    if head is None:
        raise CdmError(
            "this folder is in no Git repository, or in one without a commit, and experiments are kept in Git:"
            " run it where dvc.yaml is"
        )
    baseline = Revision(git.branch(folder) or head[:SHORT], head, folder)
    known = experiments(folder)
    if not names:
        own = [Revision(each.name, each.commit, folder) for each in known if each.baseline == head]
        return [baseline, *own, Revision(WORKSPACE, None, folder)]
    found = [_named(name, known, head, folder) for name in names]
    if len(found) == 1:
        found.insert(0, baseline)
    once: dict[str | None, Revision] = {}
    for each in found:
        once.setdefault(each.commit, each)
    return list(once.values())


def experiments(folder: Path) -> list[Reference]:
    """All experiments of the repository around `folder`, from the oldest to the newest."""
    found = []
    for reference, commit in git.references(folder, "refs/exps/*/*/*"):
        parts = re.fullmatch(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38,62})/([^/]+)", reference)
        if parts:
            found.append(Reference(parts[3], commit, parts[1] + parts[2]))
    return found


def _named(name: str, known: Sequence[Reference], head: str, folder: Path) -> Revision:
    if name == WORKSPACE:
        return Revision(WORKSPACE, None, folder)
    same = [each for each in known if each.name == name]
    own = [each for each in same if each.baseline == head] or same
    if len(own) > 1:
        commits = " or ".join(each.commit[:SHORT] for each in own)
        raise CdmError(f"{name}: experiments of several commits are called so: give {commits}")
    commit = own[0].commit if own else git.commit(folder, name)
    if commit is None:
        raise CdmError(
            f"{name}: no experiment and no revision of Git; `dvc exp list --all-commits` names the experiments"
        )
    return Revision(name, commit, folder)
