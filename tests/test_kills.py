"""A few kills of each kind, through DVC itself (`python -m tests.kills` has as many as one likes), and a Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.kills import ITERATIONS, KINDS, RULES, Left, Run, World, kill_often, made
from tests.repository import Repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("kills"), tiny_sd3)


@pytest.mark.nightly
def test_nothing_is_lost_by_kills(world: World) -> None:
    report = kill_often(world, KINDS)
    assert not report.problems, str(report)
    assert report.kills.total() == len(KINDS)


def test_a_student_that_dvc_does_not_have_keeps_its_checkpoint(world: World) -> None:
    """Also where it is drawn from: DVC deletes it before it runs the training again."""
    repository = world.clone("single-item")
    code, _ = Run(repository, "distill", plan=[{**RULES["commit"], "at": 1}]).finish()
    assert code == -signal.SIGKILL
    code, text = Run(repository, "--single-item", "sample").finish()
    assert code == 0, text
    assert Left.of(repository.folder).newest == ITERATIONS
    code, text = Run(repository, "sample").finish()
    assert code == 0, text
    assert f"resuming at iteration {ITERATIONS} of {ITERATIONS}" in text
    assert made(repository.folder) == world.made
    assert "Running stage 'sample'" not in text, "so another stage must give the disk back"
    code, text = Run(repository, "teacher").finish()
    assert (code, Left.of(repository.folder).steps) == (0, ()), text


@pytest.mark.parametrize("there", ["lock", "step-*"])
def test_ctrl_c_leaves_nothing_for_git(world: World, there: str, tmp_path: Path) -> None:
    """In a training of other parameters than those whose results are in Git; then it goes on."""
    shutil.copytree(world.folder / "reference", tmp_path / "clone", symlinks=True)
    repository = Repository(tmp_path / "clone", world.home)
    path = repository.folder / "params.yaml"
    params = YAML(typ="safe").load(path.read_text())
    params["schedule"]["max_len"] = 3
    YAML(typ="safe").dump(params, path)
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "the results of a run, and other parameters")
    run = Run(repository, "distill")
    run.wait(lambda: any(repository.folder.glob(f"checkpoints/distill-*/{there}")))
    assert not (repository.folder / "logs/distill.csv").exists()
    os.killpg(run.process.pid, signal.SIGINT)
    code, text = run.finish()
    assert code != 0, text
    assert "Traceback" not in text
    assert repository.run("git", "status", "--porcelain") == ""
    saved = Left.of(repository.folder).newest
    assert saved or there == "lock"
    assert ("resuming at iteration" in repository.dvc("repro", "distill")) == (saved > 0)
