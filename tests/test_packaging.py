"""The files around the code: continuous integration, hooks, uv, containers, citation, changelog. They name what exists,
and what two of them say is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
PINS = (ROOT / "constraints.txt").read_text().splitlines()


def read_yaml(name: str) -> Any:
    return YAML(typ="safe").load((ROOT / name).read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip().removeprefix("@") for line in lines.splitlines()]


def test_integration_runs_the_checks_on_the_oldest_python_and_on_a_newer_one() -> None:
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    checks = jobs["check"]
    assert ".ci/run" in [step.get("run") for step in checks["steps"]]
    oldest, newest = checks["strategy"]["matrix"]["python"]
    supported = SpecifierSet(PROJECT["requires-python"])
    assert supported == SpecifierSet(f">={oldest}")
    assert Version(oldest) < Version(newest)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_integration_makes_what_there_is() -> None:
    places = (".ci/run", ".github/workflows/ci.yml", ".github/workflows/nightly.yml")
    scripts = [(ROOT / place).read_text() for place in places]
    targets = set(
        re.findall(
            r"^(?:- run: )?make ([a-z-]+)(?: SLOW='[a-z ]+')?$",
            re.sub(r"^ +", "", "\n".join(scripts), flags=re.M),
            re.M,
        )
    )
    assert {"check", "test", "test-slow"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def test_the_hooks_run_what_make_check_runs() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [f".venv/bin/{command}" for command in recipe("check")]
    for hook in repository["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_uv_takes_the_pinned_versions_and_its_lock_stays_out_of_git() -> None:
    assert PYPROJECT["tool"]["uv"]["constraint-dependencies"] == PINS, "run `make pins`"
    assert "/uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (PROJECT["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    releases = [(Version(version), date) for version, date in headings[1:]]
    assert all(newer > older for newer, older in pairwise(releases))
    (paper,) = citation["references"]
    assert paper["url"].rsplit("/", 1)[1] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("form", ["bug", "idea"])
def test_a_form_asks_for_things_with_names_of_their_own(form: str) -> None:
    content = read_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= content.keys()
    names = [field["id"] for field in content["body"]]
    labels = [field["attributes"]["label"] for field in content["body"]]
    assert len(set(names)) == len(set(labels)) == len(names)


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and what they are given, lines that go on put together."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_image_installs_the_pinned_packages_for_a_user_who_is_not_root() -> None:
    steps = instructions()
    assert steps[0][0] == "ARG"
    assert re.fullmatch(r"nvidia/cuda:\$\{CUDA\}-base-\w+[\d.]+", steps[1][1])
    (install,) = [rest for word, rest in steps if word == "RUN" and "--editable" in rest]
    assert "--constraint constraints.txt" in install
    users = [number for number, (word, rest) in enumerate(steps) if word == "USER" and rest != "root"]
    assert users
    assert users[0] < steps.index(("RUN", install)), "the environment is that user's"
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = [part for word, rest in steps if word == "COPY" for part in rest.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert name not in ignored


def test_the_development_container_makes_what_there_is() -> None:
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    target = content["postCreateCommand"].split()[1]
    assert f"$(VENV)/{target.removeprefix('.venv/')}:" in MAKEFILE
    python = re.search(r"python:([\d.]+)", content["image"])
    assert python is not None
    assert python[1] in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    @pytest.fixture
    def clone(self, tmp_path: Path) -> Path:
        """A clone whose path has a space, with a Python that writes down what it is asked for."""
        folder = tmp_path / "a clone"
        (folder / ".venv/bin").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy2(ROOT / name, folder)
        python = folder / ".venv/bin/python"
        python.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" >> asked\n')
        python.chmod(0o755)
        return folder

    def make(self, folder: Path, *arguments: str) -> None:
        done = subprocess.run(
            ["make", *arguments], check=False, cwd=folder, text=True, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def test_a_clone_whose_path_has_a_space_is_installed(self, clone: Path) -> None:
        self.make(clone, "install", "TORCH_INDEX=https://example.org/torch")
        asked = (clone / "asked").read_text().splitlines()
        torch = next(pin for pin in PINS if pin.startswith("torch=="))
        assert [asked[0], asked[-1]] == [str(clone / ".venv/bin/python"), "."]
        assert asked.count(str(clone / ".venv/bin/python")) == 2, "torch, and the rest"
        assert torch in asked
        assert asked[-2] == "--editable"
        assert (clone / ".venv/installed").exists()

    def test_pins_are_copied_to_where_uv_reads_them(self, clone: Path) -> None:
        pins = [*PINS[:3], "another==1.0"]
        (clone / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins))
        self.make(clone, "pins")
        written = tomllib.loads((clone / "pyproject.toml").read_text())
        assert written["tool"]["uv"].pop("constraint-dependencies") == pins
        before = json.loads(json.dumps(PYPROJECT))
        del before["tool"]["uv"]["constraint-dependencies"]
        assert written == before
        assert all(Requirement(pin) for pin in pins)
