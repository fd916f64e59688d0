"""Kills the process that it is loaded into at a chosen event: what the fork server runs first where `FIRST` names it.

The variable `PLAN` holds rules as JSON. A rule is of one process (of a stage of DVC by its name, of DVC itself by the
empty one) and counts what Python is about to do to files whose path has one of `paths` in it: opening, renaming,
linking, deleting and so on. At event `at` the process kills itself. Where it ends by itself it leaves the number of
events in the file `count`. Events before the start of the command `after` do not count.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

PLAN = "CDM_TESTS_PLAN"
EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
}


def paths_of(arguments: tuple[Any, ...]) -> str:
    """What an event names: paths, also by the open folder that they are in."""
    words = [os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | os.PathLike)]
    numbers = [f"/proc/self/fd/{each}" for each in arguments[1:] if isinstance(each, int) and each > 2]
    return " ".join([*words, *(os.readlink(path) for path in numbers if os.path.isdir(path))])  # noqa: PTH112, PTH115


class Rule:
    def __init__(self, paths: list[str], at: int = 0, after: str = "", count: str = "", **_: str) -> None:
        self.paths, self.at, self.counts, self.after = paths, at, not after, after
        self.seen = 0
        if count:
            atexit.register(lambda: Path(count).write_text(str(self.seen)))

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and self.after and self.after in str(arguments[1]):
            self.counts = True
        if not self.counts or event not in EVENTS:
            return
        named = paths_of(arguments)
        if any(path in named for path in self.paths):
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def load() -> None:
    for rule in json.loads(os.environ.get(PLAN, "[]")):
        if rule["process"] == os.environ.get("DVC_STAGE", ""):
            sys.addaudithook(Rule(**rule))


load()
