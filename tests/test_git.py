"""What Git says about a working tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cdm.system import git


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one commit of three files."""
    (tmp_path / "in").mkdir()
    for name in ("a.py", "in/b c.py", "params.yaml"):
        (tmp_path / name).write_text("1\n")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "--message", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_changed_files_are_those_that_differ_from_the_commit(tree: Path) -> None:
    assert git.differing(tree) == []
    (tree / "in/b c.py").write_text("2\n")
    (tree / "a.py").rename(tree / "moved.py")
    (tree / "unknown").touch()
    assert git.differing(tree) == ["a.py", "in/b c.py"], "files that Git does not know do not count"
    assert git.differing(tree / "in") == ["a.py", "in/b c.py"]
    subprocess.run(["git", "add", "."], cwd=tree, check=True)
    assert git.differing(tree) == ["a.py", "in/b c.py", "moved.py", "unknown"]


def test_outside_a_repository_nothing_is_known(tmp_path: Path) -> None:
    assert git.commit(tmp_path) is None
    assert git.differing(tmp_path) == []


def test_files_that_are_gone_come_back_and_no_others_change(tree: Path) -> None:
    for name in ("a.py", "in/b c.py"):
        (tree / name).unlink()
    (tree / "in").rmdir()
    (tree / "params.yaml").write_text("2\n")
    git.restore_deleted(tree, ["in", "params.yaml", "never"])
    assert git.differing(tree) == ["a.py", "params.yaml"]
    assert (tree / "in/b c.py").read_text() == "1\n"
    git.restore_deleted(tree / "in", ["b c.py", "a.py"])
    assert git.differing(tree) == ["a.py", "params.yaml"]
