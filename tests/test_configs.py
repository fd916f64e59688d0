"""The launch files: accelerate understands each, and the one for this machine's CPU really runs the stages."""

from __future__ import annotations

import csv
import os
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

    def start(self, stage: str, executable: Path | str | None = None) -> subprocess.Popen[str]:
        """Runs the stage, and all processes that it launches, with the Python `executable`: here one that forks."""
        YAML(typ="safe").dump(self.values, self.folder / "params.yaml")
        ours = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
        return subprocess.Popen(
            [executable or python(), "-m", f"stages.{stage}"],
            cwd=self.folder,
            env={**ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, stage: str, executable: Path | str | None = None) -> tuple[int, str]:
        """Exit code and standard error."""
        process = self.start(stage, executable)
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
    """With nothing but what users have: every process begins anew."""
    code, errors = project.run("latents", sys.executable)
    assert code == 0, errors
    Store(project.folder / "data/latents").verify()


def test_a_problem_is_said_once_and_ends_with_its_code(project: Project) -> None:
    project.values["distill"]["batch_size"] = 3
    code, errors = project.run("distill")
    assert code == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == ["error: distill.batch_size 3 does not divide over 2 processes"]
    assert "Traceback" not in errors


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
