"""The launch files: accelerate understands each, and the one for this machine's CPU really runs the stages."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from ruamel.yaml import YAML

from cdm.data.store import Store
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.system.environment import SETTINGS
from cdm.training import checkpoint
from tests.fork_server import FIRST
from tests.inputs import build_prompts
from tests.launching import python

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def environment(config: Path) -> dict[str, str]:
    """What accelerate would set in the environment of the processes."""
    arguments = ["--config_file", str(config), "--module", "stages.distill"]
    return prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(arguments))[0])


@pytest.mark.parametrize(
    ("name", "machines", "processes", "sharded"),
    [
        ("cpu-two-processes", 1, 2, False),
        ("one-machine", 1, 8, False),
        ("two-machines", 2, 16, False),
        ("fsdp2", 1, 8, True),
    ],
)
def test_accelerate_understands_it(name: str, machines: int, processes: int, sharded: bool) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "no"
    assert environment(path).get("ACCELERATE_USE_FSDP", "false") == str(sharded).lower()
    assert environment(path).get("FSDP_VERSION", "2") == "2"


def test_every_config_is_tested() -> None:
    assert len(list(CONFIGS.iterdir())) == 4


class Project:
    """A folder with the inputs of `latents` and `distill`, which launch themselves in two processes."""

    def __init__(self, folder: Path, params: Params, teacher: TeacherManifest) -> None:
        self.folder = folder
        build_prompts(params, teacher, folder / "data/prompts")
        teacher.write(folder / "data/teacher.json")
        self.values: dict[str, Any] = params.model_dump(mode="json")
        self.values["runtime"]["accelerate_config"] = str(CONFIGS / "cpu-two-processes.yaml")
        self.values["evaluate"] |= {"judge": None, "real": None}
        self.values["distill"] |= {"iterations": 4, "batch_size": 2, "student_every": 2, "fake_only": 2}

    def start(
        self, stage: str, executable: Path | str | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Runs the stage, and all processes that it launches, with the Python `executable`: here one that forks."""
        YAML(typ="safe").dump(self.values, self.folder / "params.yaml")
        ours = {name: value for name, value in os.environ.items() if name not in {"DVC_ROOT", *SETTINGS}}
        return subprocess.Popen(
            [executable or python(), "-m", f"stages.{stage}"],
            cwd=self.folder,
            env={**ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, stage: str, executable: Path | str | None = None, **environment: str) -> tuple[int, str]:
        """Exit code and standard error."""
        process = self.start(stage, executable, **environment)
        _, errors = process.communicate()
        return process.returncode, errors


@pytest.fixture
def project(tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path) -> Project:
    return Project(tmp_path / "project", tiny_params, tiny_teacher)


def test_a_stage_launches_itself(project: Project) -> None:
    code, errors = project.run("distill")
    assert code == 0, errors
    with (project.folder / "logs/distill.csv").open(newline="") as log:
        assert [row["iteration"] for row in csv.DictReader(log)] == ["2", "4"]
    assert (project.folder / "models/student/model_index.json").exists()


@pytest.mark.slow
def test_so_does_a_stage_that_draws(project: Project) -> None:
    """With nothing but what users have: every process begins anew, in an environment that nobody has prepared."""
    code, errors = project.run("latents", sys.executable)
    assert code == 0, errors
    assert re.sub(r"latents: .*\n", "", errors) == "", "nothing but progress"
    Store(project.folder / "data/latents").verify()


def test_a_problem_is_said_once_and_ends_with_its_code(project: Project) -> None:
    project.values["distill"]["batch_size"] = 3
    code, errors = project.run("distill")
    assert code == 1
    assert re.fullmatch(r"error: rank [01]: distill.batch_size 3 does not divide over 2 processes\n", errors)


BROKEN = """
import os, signal
from cdm.errors import CdmError
from cdm.training.distiller import Distiller

def broken(self, iteration):
    FAILURE

if os.environ.get("RANK") == "1":
    Distiller.round = broken
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        ("raise CdmError('no more')", 1, ["error: rank 1: no more"]),
        ("raise ValueError('odd')", 1, ["error: rank 1: unforeseen", "ValueError: odd"]),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            ["error: rank 1: ended by SIGKILL, and so were the others"],
        ),
    ],
)
def test_what_goes_wrong_in_one_process_is_said_once_and_ends_all(
    project: Project, failure: str, code: int, said: list[str]
) -> None:
    """Though the other one then misses it, and fails for that."""
    first = project.folder / "first.py"
    first.write_text(BROKEN.replace("FAILURE", failure))
    found, errors = project.run("distill", **{FIRST: str(first)})
    assert found == code, errors
    lines = errors.splitlines()
    assert lines[0] == said[0]
    assert lines[-1].endswith(said[-1])
    assert len(lines) == 1 or errors.count("Traceback") == 1


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_that_trains_on(project: Project) -> None:
    """They save, as on any request to stop, and so the next run goes on there."""
    project.values["distill"]["iterations"] = 100_000
    project.values["runtime"]["checkpoint_every"] = 2
    process = project.start("distill", sys.executable)
    while not list(project.folder.glob("checkpoints/distill-*/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    (folder,) = project.folder.glob("checkpoints/distill-*")
    process.communicate()  # until nobody has its standard output open any more
    before = sorted(path.name for path in folder.glob("step-*"))
    with checkpoint.locked(folder):
        time.sleep(1)
    assert sorted(path.name for path in folder.glob("step-*")) == before


@pytest.mark.slow
def test_a_signal_to_the_stage_makes_its_processes_save(project: Project) -> None:
    project.values["distill"]["iterations"] = 100_000
    project.values["runtime"]["checkpoint_every"] = 2
    process = project.start("distill")
    while not list(project.folder.glob("checkpoints/distill-*/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped and saved at iteration" in printed
    assert "Traceback" not in errors
    assert not (project.folder / "models").exists()
