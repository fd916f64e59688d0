"""One's own baseline: a commit of the results that this machine makes of the committed parameters.

Processors round differently, so that another machine's student is another one, and its figures are others. Experiments
are compared with a commit: its results should be of the machine that runs them.
"""

from __future__ import annotations

from pathlib import Path

from cdm.errors import CdmError
from cdm.experiments.revisions import SHORT
from cdm.system import git
from cdm.system.lock import RESULTS, is_result, is_unchanged

MESSAGE = "Baseline: results of this machine"


def notice(folder: Path = Path()) -> list[str]:
    """Two lines where the results differ from the commit's though nothing else does; none otherwise."""
    results, others = _changed(folder)
    if others or not results:
        return []
    return [
        "These results differ from those in Git: another machine, which rounds differently, or other code made those.",
        "`make baseline` commits them, so that your experiments are compared with results of your own.",
    ]


def commit_baseline(folder: Path = Path()) -> str:
    """Commit the results, and nothing else; returns the commit, or an empty text where there is nothing to commit.

    Raises CdmError where they would not be those of the commit: something else differs, or the pipeline has not run
    to its end; or where no branch is checked out.
    """
    results, others = _changed(folder)
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise CdmError(
            f"{shown}: changed, so that the results may not be those of the commit; commit this yourself, or put it"
            " back (git restore --staged --worktree), and then run `make repro` again"
        )
    if not results:
        return ""
    if git.branch(folder) is None:  # as a killed `dvc exp run` leaves it
        raise CdmError("no branch is checked out, so that the commit would be lost: `git switch main` first")
    if not is_unchanged(folder):
        raise CdmError("the results are not those of the last run, or not all there: run `make repro` first")
    problem = git.commit_files(folder, MESSAGE, [path for path in RESULTS if (folder / path).exists()])
    if problem:
        raise CdmError(f"git commit: {problem}")
    return (git.commit(folder) or "")[:SHORT]


def _changed(folder: Path) -> tuple[list[str], list[str]]:
    """The results that differ from the commit, and what else does, but for new files that are none."""
    found = git.changed(folder)
    if found is None or git.commit(folder) is None:
        raise CdmError("this folder is in no Git repository, or in one without a commit")

    return (
        [each.path for each in found if is_result(each.path)],
        [each.path for each in found if each.known and not is_result(each.path)],
    )
