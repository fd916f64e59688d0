"""The pipeline's stages: thin entry points, `python -m stages.NAME`, that dvc.yaml runs in order.

This file runs before any of them imports torch. What must be so by then, or must hold while they import it, is done
here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

from cdm.system import git
from cdm.system.environment import missing_packages, prepare_environment
from cdm.system.launcher import SIGNALLED, is_launched
from cdm.system.parent import follow_parent

STARTED_BY_DVC = "DVC_STAGE"
"""Variable of the environment in which DVC names the stage that it runs."""

IN_GIT = ("logs/distill.csv", "metrics", "plots", "comparison/results", "judging/results")
"""Results that are in Git and take their time: files, and folders with all that is in them."""


def restore_results() -> None:
    """Brings back those results that DVC has deleted before a stage that then came to nothing, as Git has them.

    Otherwise `git commit --all` after a Ctrl-C would delete them.
    """
    git.restore_deleted(Path(), IN_GIT)


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A Ctrl-C while a stage still imports its libraries is no fault of theirs."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(SIGNALLED + number)


prepare_environment()
if (problem := missing_packages()) is not None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(1)
if STARTED_BY_DVC in os.environ or is_launched():
    follow_parent()
if STARTED_BY_DVC in os.environ and not is_launched():
    atexit.register(restore_results)
    sys.excepthook = _show
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
