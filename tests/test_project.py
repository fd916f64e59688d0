"""What the project says about itself is so: its layout, lock, Makefile."""

from __future__ import annotations

import ast
import pkgutil
import re
import shutil
import subprocess
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_the_tree_of_the_architecture_names_files_and_rooms_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (tree,) = re.findall(r"## Layout\n.*?```text\n(.*?)```", page, re.DOTALL)
    rooms = set()
    for line in tree.splitlines():
        names = re.findall(r"[\w.-]+/?", re.split(r"\s{2,}", line.strip())[0])
        inside = line.startswith(" ")
        for name in names:
            assert (ROOT / ("cdm" if inside else "") / name).exists(), name
            rooms |= {name.rstrip("/")} if inside and name.endswith("/") else set()
    assert rooms == {path.parent.name for path in ROOT.glob("cdm/*/__init__.py")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, whatever runs it."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("tests", {"benchmarks"}),
        ("benchmarks", {"tests"}),
        ("reference", {"benchmarks", "tests"}),
        ("cdm", {"benchmarks", "comparison", "judging", "miniature", "reference", "stages", "tests"}),
    ],
)
def test_packages_stay_apart(folder: str, others: set[str]) -> None:
    modules = list((ROOT / folder).rglob("*.py"))
    assert len(modules) > 2
    for path in modules:
        if path.name in {"test_agreement.py", "test_gpu_benchmark.py"}:
            continue  # what they test is a benchmark
        assert not {name.split(".")[0] for name in imports(path)} & others, path


def test_the_yardstick_shares_no_code_with_the_training_step() -> None:
    found = imports(ROOT / "reference/plain.py")
    assert "cdm.flow" in found
    assert not any(name.startswith("cdm.training.distiller") for name in found)


def requirements() -> list[Requirement]:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    found = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    return [each for each in found if each.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_lock_pins_every_requirement(requirement: Requirement) -> None:
    pinned = {canonicalize_name(name): version for name, version in LOCK.items()}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_the_lock_names_versions_only() -> None:
    """Nothing of the machine that it was made on: no paths, no addresses, no local builds."""
    for name, version in LOCK.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9A-Za-z.]*", version)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with what make needs, and an environment in which everything is installed."""
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy2(ROOT / name, tmp_path)
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/python").touch()
        (tmp_path / ".venv/installed").touch()
        return tmp_path

    def make(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments], check=False, cwd=folder, text=True, capture_output=True, timeout=60
        )

    def test_help_is_the_default(self, folder: Path) -> None:
        assert "make repro" in self.make(folder).stdout

    def test_an_old_python_is_refused(self, folder: Path) -> None:
        shutil.rmtree(folder / ".venv")
        done = self.make(folder, "install", "PYTHON=false")
        assert done.returncode != 0
        assert "error: false is missing or older than Python 3.11; name another" in done.stderr
        assert not (folder / ".venv").exists()

    def test_an_archive_without_git_is_refused_with_a_way_out(self, folder: Path) -> None:
        done = self.make(folder, "repro")
        assert done.returncode != 0
        assert "not a Git repository" in done.stderr
        assert "git init" in done.stderr

    def test_what_is_installed_is_not_installed_again(self, folder: Path) -> None:
        assert "Nothing to be done" in self.make(folder, "install").stdout
        (folder / "constraints.txt").touch()
        assert "Installing" in self.make(folder, "--dry-run", "install").stdout


def test_the_table_of_equations_names_functions_that_exist() -> None:
    names = set(re.findall(r"`(cdm\.[A-Za-z_.]+)`", (ROOT / "docs/equations.md").read_text()))
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def rooms_that_import() -> dict[str, set[str]]:
    """The rooms of cdm, packages and modules on top, each with the rooms that it imports when it runs."""
    graph: dict[str, set[str]] = {}
    for path in sorted((ROOT / "cdm").rglob("*.py")):
        if path.parent == ROOT / "cdm" and path.stem == "__init__":
            continue  # the interface, which imports when it is asked
        room = path.relative_to(ROOT / "cdm").parts[0].removesuffix(".py")
        names = set[str]()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found = {name.split(".")[1] for name in names if name.startswith("cdm.")}
        graph.setdefault(room, set()).update(found - {room})
    known = set(graph)
    return {room: imported & known for room, imported in graph.items()}


def test_rooms_import_in_one_direction() -> None:
    graph = rooms_that_import()
    assert {"training", "families", "flow", "params"} <= set(graph)
    assert "families" in graph["training"]
    tuple(TopologicalSorter(graph).static_order())  # CycleError names a circle
