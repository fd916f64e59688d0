"""Kills `dvc repro` on a tiny world and checks what is left: `python -m tests.kills --kills 50`.

Each trial is a repository whose student is still to be trained. In it runs of DVC are killed by SIGKILL, with all that
they have started, and then one is left to finish. Its student, log, pictures and samples must be those of a run that
nobody killed; each run must go on at the newest checkpoint that the one before left, so that no training that had
finished is done again; and in the end nothing is left in the folder of checkpoints.

Moments are of these kinds: at random (`any`); in the training, before it opens, renames or deletes a file of a
checkpoint (`writing`), or while one is being written (`torn`); after the training, before DVC does so with a file of
the student, of its cache or of its lock (`commit`), or soon after the student is there (`end`); and in the stage
`sample`, before a file of the checkpoints is opened or deleted (`removal`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from tests import launching, tiny_pipelines
from tests.fatal import PLAN
from tests.fork_server import FIRST
from tests.forked import Forked
from tests.repository import Repository, make_repository

KINDS = ("any", "writing", "torn", "commit", "end", "removal")
ITERATIONS, EVERY = 12, 2
MADE = ("models/student", "logs/distill.csv", "logs/pictures", "data/prompts", "data/latents", "data/samples")
"""What a run must leave as one does that nobody has killed."""
RULES: dict[str, dict[str, Any]] = {
    "writing": {"process": "distill", "paths": ["checkpoints/distill-"]},
    "removal": {"process": "sample", "paths": ["checkpoints/"]},
    "commit": {
        "process": "",
        "paths": ["models/student", "cache/files", "cache/runs", "dvc.lock"],
        "after": "stages.distill",
    },
}
"""What `tests/fatal.py` counts, for kinds of kills that are at an event."""
TARGETS = {kind: "distill" if kind in ("writing", "torn", "end") else "sample" for kind in KINDS}
"""What is asked of DVC; where its own events are counted, as much as when they were."""


@dataclass(frozen=True)
class Left:
    """What a run has left: the steps of whole checkpoints, newest first, and whether DVC has the student."""

    steps: tuple[int, ...]
    committed: bool

    @classmethod
    def of(cls, folder: Path) -> Left:
        names = [path.name.removeprefix("step-") for path in folder.glob("checkpoints/distill-*/step-*")]
        steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
        return cls(tuple(steps), "stages.distill" in (folder / "dvc.lock").read_text())

    @property
    def newest(self) -> int:
        return max(self.steps, default=0)

    @property
    def finished(self) -> bool:
        return self.committed or self.newest == ITERATIONS


CURES: dict[str, Callable[[Repository], object]] = {
    "Unable to read RWLock-file": lambda repository: (repository.folder / ".dvc/tmp/rwlock").unlink(),
    "dvc.lock' ": lambda repository: repository.run("git", "restore", "dvc.lock"),
}
"""What docs/trouble.md says to do where a kill hit DVC while it wrote a file in place, by what DVC then says."""

GOES_ON = re.compile(r"resuming at|Stage 'distill' is cached")
"""What a run says that does not begin the training anew."""


@dataclass
class Report:
    """What all trials have found."""

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    """Kills after the end of a training."""
    mended: int = 0
    """Kills in the moment in which DVC wrote a file in place, which it cannot read then."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {self.kills[kind]}" for kind in KINDS if self.kills[kind])
        counts = f"{self.kills.total()} kills ({kinds}), {self.finished} of them after the end of a training"
        if self.mended:
            counts += (
                f", {self.mended} while DVC wrote a file that it cannot read then, as docs/trouble.md says"
            )
        return "\n".join([counts, *self.problems, f"{len(self.problems)} problems"])


class World:
    """Repositories of a tiny teacher, whose students are still to be trained, and what a run makes of one."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self.template = self._prepare(make_repository(folder / "template", self.home, teacher))
        reference, counts = self.clone("reference"), folder / "counts"
        counts.mkdir()
        plan = [rule | {"count": str(counts / kind)} for kind, rule in RULES.items()]
        begun = time.monotonic()
        code, text = Run(reference, "sample", plan=plan).finish()
        assert code == 0, text
        self.seconds = time.monotonic() - begun
        self.made = made(reference.folder)
        self.events = {kind: int((counts / kind).read_text()) for kind in RULES}
        assert min(self.events.values()) > 5, self.events

    def _prepare(self, repository: Repository) -> Repository:
        path = repository.folder / "params.yaml"
        values = YAML(typ="safe").load(path.read_text())
        values["distill"]["iterations"] = ITERATIONS
        values["runtime"] |= {"checkpoint_every": EVERY, "pictures_every": 2 * EVERY, "device": "cpu"}
        with path.open("w") as file:
            YAML(typ="safe").dump(values, file)
        repository.dvc("repro", "latents")
        repository.run("git", "add", ".")
        repository.run("git", "commit", "--quiet", "--message", "a template")
        return repository

    def clone(self, name: str) -> Repository:
        shutil.copytree(self.template.folder, self.folder / name, symlinks=True)
        return Repository(self.folder / name, self.home)


class Run:
    """`dvc repro ARGUMENTS`, begun, with a plan of `tests/fatal.py`."""

    def __init__(self, repository: Repository, *arguments: str, plan: Sequence[dict[str, Any]] = ()) -> None:
        self.folder = repository.folder
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `finish` closes it
        script = str(Path(__file__).with_name("fatal.py"))
        self.process = Forked(
            f"{os.environ[launching.SERVER]}/socket",
            "dvc",
            ["repro", *arguments],
            str(self.folder),
            {**repository.environment, FIRST: script, PLAN: json.dumps(plan)},
            str(launching.python()),
            streams=(0, self.said.fileno(), self.said.fileno()),
        )

    def wait(self, until: Callable[[], object], every: float = 0.0005) -> None:
        """Until the condition holds, or the run has ended."""
        while self.process.runs and not until():
            time.sleep(every)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self) -> tuple[int, str]:
        """Exit code and what it said, once all that it has started has ended too."""
        code = self.process.wait()
        deadline = time.monotonic() + 30
        while list(self._processes()):
            assert time.monotonic() < deadline, "processes outlive the run"
            time.sleep(0.02)
        with self.said:
            self.said.seek(0)
            return code, self.said.read()

    def _processes(self) -> Iterator[int]:
        """Those that work in the folder."""
        for path in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if path.readlink() == self.folder:
                    yield int(path.parent.name)


class Trial:
    """A repository in which runs are killed, one after the other, until one may finish."""

    def __init__(self, world: World, name: str, chance: random.Random, report: Report) -> None:
        self.world, self.name, self.chance, self.report = world, name, chance, report
        self.repository = world.clone(name)
        self.folder = self.repository.folder
        self.left = Left.of(self.folder)

    def kill(self, kind: str) -> bool:
        """Kills a run at a moment of this kind; False where it has ended before."""
        plan = [RULES[kind] | {"at": self._moment(kind)}] if kind in RULES else []
        run = Run(self.repository, TARGETS[kind], plan=plan)
        if kind == "any":
            end = time.monotonic() + self.chance.uniform(0, self.world.seconds)
            run.wait(lambda: time.monotonic() > end)
        elif kind == "torn":
            step = self.chance.choice([*range(self.left.newest + EVERY, ITERATIONS, EVERY), ITERATIONS])
            run.wait(lambda: any(self.folder.glob(f"checkpoints/distill-*/step-*{step}.partial")))
            time.sleep(self.chance.uniform(0, 0.02))
        elif kind == "end":
            run.wait((self.folder / "models/student/student.json").exists)
            time.sleep(self.chance.uniform(0, 1))
        if not plan:
            run.kill()
        code, text = run.finish()
        self._check(text)
        if code == 0 or self._mend(text):
            return False
        self.report.kills[kind] += 1
        self.report.finished += self.left.finished
        print(f"{self.name}: {kind} {plan[0]['at'] if plan else ''}: {self.left}", flush=True)
        return True

    def _moment(self, kind: str) -> int:
        """The number of an event of this kind; a training that goes on has fewer of them."""
        left = 1 - self.left.newest / ITERATIONS if kind == "writing" else 1
        return self.chance.randint(1, max(1, round(self.world.events[kind] * left)))

    def finish(self) -> None:
        """Lets a run come to its end, and compares what it has made."""
        code, text = Run(self.repository, "sample").finish()
        if code and self._mend(text):
            code, text = Run(self.repository, "sample").finish()
        if code:
            self._problem(f"the last run failed with {code}", text)
        elif self.left.newest and not self.left.committed and not GOES_ON.search(text):
            self._problem(f"it has begun anew, after {self.left}", text)
        self._check(text)
        found = made(self.folder)
        wrong = [
            name for name in sorted({*found, *self.world.made}) if found.get(name) != self.world.made.get(name)
        ]
        if wrong:
            self._problem(f"other than without a kill: {', '.join(wrong)}", text)
        if remains := [path.name for path in (self.folder / "checkpoints").glob("*")]:
            self._problem(f"left in checkpoints: {', '.join(remains)}", text)
        if not wrong and not remains:
            shutil.rmtree(self.folder)

    def _check(self, text: str) -> None:
        """Whether a run went on where the one before had stopped; then what it has left."""
        before, self.left = self.left, Left.of(self.folder)
        if before.committed and "Running stage 'distill'" in text:
            self._problem("a student that DVC had was trained again", text)
        for step in re.findall(r"resuming at iteration (\d+)", text):
            if int(step) != before.newest:
                self._problem(f"it went on at {step}, after {before}", text)
        if not self.left.committed and self.left.newest < before.newest:
            self._problem(f"checkpoints were lost: {self.left}, after {before}", text)

    def _mend(self, text: str) -> bool:
        """Does what docs/trouble.md says of DVC's words; False where it says nothing."""
        for words, cure in CURES.items():
            if words in text:
                self.report.mended += 1
                cure(self.repository)
                return True
        return False

    def _problem(self, problem: str, text: str) -> None:
        self.report.problems.append(f"{self.folder}: {problem}")
        print(f"{self.folder}: {problem}\n{text}", flush=True)


def made(folder: Path) -> dict[str, str]:
    """Hashes of the files that a run has made, by path."""
    roots = [folder / name for name in MADE]
    files = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def kill_often(world: World, kinds: Sequence[str], seed: int = 0) -> Report:
    """Kills runs at a moment of each of these kinds, up to three in a repository."""
    chance, report = random.Random(seed), Report()
    print(f"{world.seconds:.1f} s undisturbed, events {world.events}", flush=True)
    waiting, trial, number = list(kinds), None, 0
    while waiting:
        if trial is None:
            number += 1
            trial = Trial(world, f"trial-{number}", chance, report)
        if landed := trial.kill(waiting[0]):
            waiting.pop(0)
        if trial.left.committed or not waiting or (landed and report.kills.total() % 3 == 0):
            trial.finish()
            trial = None
    return report


def main(
    kills: Annotated[int, typer.Option(help="How many kills, of each kind in turn.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill `dvc repro` on a tiny world, and check that nothing is lost; what has gone wrong is kept."""
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    teacher = tiny_pipelines.save("sd3", folder / "teacher")
    with launching.fork_server():
        report = kill_often(World(folder / "world", teacher), list(islice(cycle(KINDS), kills)), seed)
    print(report)
    if report.problems:
        sys.exit(f"{folder} has the repositories")
    shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
