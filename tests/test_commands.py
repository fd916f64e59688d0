"""How commands and stages begin and end as processes: their environment, whom they follow, what a Ctrl-C leaves."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdm.system.environment import SETTINGS

ROOT = Path(__file__).parent.parent


def start(program: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python of its own, in an environment that nobody has prepared."""
    ours = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**ours, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SHOWS = "import os, sys; print(os.environ['TRANSFORMERS_VERBOSITY'], sys.dont_write_bytecode, 'torch' in sys.modules)"


COMMAND = """
import contextlib
from cdm import cli
cli.app = lambda **_: None
with contextlib.suppress(SystemExit):
    cli.main()
"""


@pytest.mark.parametrize("begun", ["import stages", COMMAND])
def test_commands_and_stages_prepare_their_environment_before_torch_is_there(
    begun: str, tmp_path: Path
) -> None:
    printed, errors = start(f"{begun}\n{SHOWS}", tmp_path, PYTHONDONTWRITEBYTECODE="1").communicate()
    assert printed.split() == ["error", "False", "False"], errors


def test_a_python_without_the_packages_says_what_to_activate() -> None:
    """What `dvc repro` starts where no environment has been activated."""
    command = [sys.executable, "-S", "-m", "stages.teacher"]  # -S: without what is installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no diffusers, psutil, ")
    assert "source .venv/bin/activate" in line


@pytest.mark.parametrize(("set_by_user", "expected"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_takes_the_number_of_spins(set_by_user: dict[str, str], expected: str, tmp_path: Path) -> None:
    """The library that torch brings says so as it is loaded, and then it is too late for any other."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    found = [*torch.glob("lib/libgomp*"), *torch.parent.glob("torch.libs/libgomp*")]
    if not found:
        pytest.skip("this torch has not GNU's OpenMP")
    program = f"import stages, ctypes; ctypes.CDLL({str(found[0])!r})"
    _, errors = start(program, tmp_path, OMP_DISPLAY_ENV="VERBOSE", **set_by_user).communicate()
    assert f"GOMP_SPINCOUNT = '{expected}'" in errors


FOLLOWER = """
import os, time
from cdm.system import parent
parent.EVERY = 0.01
parent.follow_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
STARTER = """
import subprocess, sys
subprocess.run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "follower.py"], ["sh", "-c", f"{shlex.quote(sys.executable)} follower.py; exit"]],
)
def test_a_process_ends_after_the_one_that_has_started_it(command: list[str], tmp_path: Path) -> None:
    """Also where a shell stands between them, which waits."""
    (tmp_path / "follower.py").write_text(FOLLOWER)
    process = start(STARTER, tmp_path, *command)
    assert process.stdout is not None
    os.kill(int(process.stdout.readline()), 0)
    process.kill()
    printed, errors = process.communicate(timeout=60)  # until nobody has its standard output open any more
    assert (printed, errors) in [("", ""), ("", "Terminated\n")]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a log, which has been deleted, as DVC does before a stage."""
    for name in ("logs/distill.csv", "metrics/quality.json", "cdm/losses.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "--message", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for name in ("logs/distill.csv", "cdm/losses.py"):
        (tmp_path / name).unlink()
    (tmp_path / "metrics/quality.json").write_text("2\n")
    return tmp_path


def changes(repository: Path) -> list[str]:
    done = subprocess.run(
        ["git", "status", "--porcelain"], cwd=repository, check=True, text=True, capture_output=True
    )
    return done.stdout.splitlines()


RUNS = "from stages.common import run; import sys; run(lambda: {does})"


@pytest.mark.parametrize(
    ("program", "started_by_dvc", "restored"),
    [
        (RUNS.format(does="sys.exit(130)"), True, True),
        ("import stages; raise ValueError", True, True),
        (RUNS.format(does="sys.exit(0)"), True, False),
        (RUNS.format(does="None"), True, False),
        (RUNS.format(does="sys.exit(130)"), False, False),
    ],
)
def test_a_stage_that_comes_to_nothing_leaves_the_results_that_git_has(
    repository: Path, program: str, started_by_dvc: bool, restored: bool
) -> None:
    """Only those that are gone, and no code. A stage that has done its work may have deleted one for good."""
    _, errors = start(program, repository, **({"DVC_STAGE": "distill"} if started_by_dvc else {})).communicate()
    log = [] if restored else [" D logs/distill.csv"]
    assert changes(repository) == [" D cdm/losses.py", *log, " M metrics/quality.json"], errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_stopped_while_it_imports_says_so(repository: Path, number: signal.Signals) -> None:
    process = start(
        "import stages; print(1, flush=True); import time; time.sleep(60)", repository, DVC_STAGE="distill"
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate()
    assert errors == ("stopped\n" if number == signal.SIGINT else "")
    assert changes(repository) == [" D cdm/losses.py", " M metrics/quality.json"]
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
