"""The version: that of pyproject.toml in a clone, with its commit; that of the installation elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from cdm import cli
from cdm.system import version

ROOT = Path(__file__).parent.parent
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of version 9.8.7, which is the one that the package is run from."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "cdm"\nversion = "9.8.7"\n')
    monkeypatch.setattr(version, "ROOT", tmp_path)
    return tmp_path


def test_a_clone_says_its_commit_and_whether_files_differ(clone: Path) -> None:
    assert version.describe() == "9.8.7", "no repository"
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*GIT, *arguments], cwd=clone, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
    assert version.describe() == f"9.8.7 (commit {commit.stdout[:12]})"
    (clone / "pyproject.toml").write_text('[project]\nname = "cdm"\nversion = "9.8.8"\n')
    assert version.describe() == f"9.8.8 (commit {commit.stdout[:12]}, with changes)"


@pytest.mark.parametrize("content", [None, "[project", '[project]\nname = "other"\nversion = "3"\n'])
def test_elsewhere_it_is_that_of_the_installation(clone: Path, content: str | None) -> None:
    (clone / "pyproject.toml").unlink()
    if content is not None:
        (clone / "pyproject.toml").write_text(content)
    assert version.version() == metadata.version("cdm")


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cdm", "--version"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.match(rf"cdm {re.escape(declared)}( \(commit |$)", capsys.readouterr().out)
