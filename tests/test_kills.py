"""A few kills of each kind, through DVC itself (`python -m tests.kills` has as many as one likes), and a Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.kills import KINDS, Left, Run, World, kill_often
from tests.repository import Repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("kills"), tiny_sd3)


def test_nothing_is_lost_by_kills(world: World) -> None:
    report = kill_often(world, KINDS)
    assert not report.problems, str(report)
    assert report.kills.total() == len(KINDS)


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
