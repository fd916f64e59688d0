"""The pipeline's files say what the code does: each stage's real imports and the parameters that it really reads."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cdm.families import family_names
from cdm.params import Params
from tests import code

ROOT = Path(__file__).parent.parent
NAMES = ["teacher", "prompts", "latents", "distill", "sample", "evaluate"]
WATCHED = "cdm.training.watch"
"""What people look at while a student is trained. It changes nothing of the student (test_watch.py), so that a change
of it must not cost a training: no stage lists it, nor what only it imports or reads."""
CHECKED = ("cdm.evaluation.measures", "cdm.evaluation.model_files")
"""What the check of the parameters knows of measures: only `evaluate` computes with it, and no other stage lists it."""
MINIATURE = ["real", "judge", "vae", "teacher"]


def pipeline(path: str) -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / path).read_text())


STAGES: dict[str, dict[str, Any]] = pipeline("dvc.yaml")["stages"]
MINIATURE_STAGES: dict[str, dict[str, Any]] = pipeline("miniature/dvc.yaml")["stages"]


def files(stage: dict[str, Any]) -> set[str]:
    """The dependencies of a stage that are code."""
    return {dep for dep in stage["deps"] if dep.endswith(".py") or dep.startswith(("cdm/", "stages/"))}


def paths(entries: list[Any]) -> set[str]:
    """Outs, metrics or plots by path, with or without options."""
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def outs(stage: dict[str, Any]) -> set[str]:
    return paths([entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])])


def test_the_six_stages_are_those_of_the_scripts() -> None:
    assert list(STAGES) == NAMES
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")}
    assert scripts - {"__init__", "common"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_runs_its_script_with_the_python_of_the_path(name: str) -> None:
    assert STAGES[name]["cmd"] == f"python -m stages.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_deps_are_the_modules_that_the_stage_imports(name: str) -> None:
    without = (WATCHED,) if name == "evaluate" else (WATCHED, *CHECKED)
    imported, listed = code.imported_files(f"stages.{name}", without), files(STAGES[name])
    assert sorted(imported - listed) == [], f"deps of {name} lack what it imports"
    assert sorted(listed - imported) == [], f"deps of {name} list what it does not import"
    assert len(STAGES[name]["deps"]) == len(set(STAGES[name]["deps"]))


@pytest.mark.parametrize("name", NAMES)
def test_params_are_the_sections_that_the_stage_reads(name: str) -> None:
    listed = set(STAGES[name]["params"])
    assert listed <= set(Params.model_fields)
    assert listed == code.sections_declared(f"stages.{name}"), "dvc.yaml and `with stage(...)` differ"
    assert listed == code.sections_read(f"stages.{name}", without=WATCHED) - {"runtime"}, (
        "dvc.yaml and the code differ"
    )


@pytest.mark.parametrize("name", NAMES)
def test_outs_of_a_stage_are_the_defaults_of_its_options(name: str) -> None:
    """A stage is told no paths by dvc.yaml: what it reads and writes by default is what DVC expects."""
    defaults = {
        call.args[0].value.rstrip("/")
        for call in ast.walk(code.tree(f"stages.{name}"))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "Path"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }
    assert outs(STAGES[name]) <= defaults
    between = {path for other in NAMES for path in outs(STAGES[other])}
    read = {dep for dep in STAGES[name]["deps"] if dep in between}
    assert read | outs(STAGES[name]) == defaults & between


@pytest.mark.parametrize("name", family_names())
def test_a_family_imports_no_other(name: str) -> None:
    """So that a change of one architecture reruns no pipeline of another."""
    others = {f"{code.FAMILIES}.{other}" for other in family_names()} - {f"{code.FAMILIES}.{name}"}
    assert not others & code.imported_modules(f"{code.FAMILIES}.{name}")


def test_runtime_is_listed_by_no_stage() -> None:
    assert not any("runtime" in stage["params"] for stage in STAGES.values())


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*.yaml"))], ids=lambda path: path.name
)
def test_every_params_file_has_what_dvc_reads_of_it(path: Path) -> None:
    """DVC fills in `${...}` from the file itself and knows no defaults."""
    values = YAML(typ="safe").load(path.read_text())
    names = re.findall(r"\$\{([^}]+)\}", "\n".join(dep for stage in STAGES.values() for dep in stage["deps"]))
    assert "distill.probe.track" in names
    for name in names:
        found = values
        for part in name.replace("[", ".").replace("]", "").split("."):
            found = found[int(part) if part.isdigit() else part]
        assert isinstance(found, str)


def test_what_a_section_reruns() -> None:
    """The point of granular params: a change reaches the stages that read it, and those after them."""

    def reruns(section: str) -> list[str]:
        stale: set[str] = set()
        for name, stage in STAGES.items():  # in the order of the pipeline
            inputs = {path for other in stale for path in outs(STAGES[other])}
            if section in stage["params"] or inputs & set(stage["deps"]):
                stale.add(name)
        return sorted(stale, key=NAMES.index)

    assert reruns("schedule") == ["distill", "sample", "evaluate"]
    assert reruns("distill") == ["distill", "sample", "evaluate"]
    assert reruns("sample") == ["sample", "evaluate"]
    assert reruns("evaluate") == ["evaluate"]
    assert reruns("teacher") == NAMES


def test_metrics_and_plots_are_in_git_and_everything_else_in_the_cache() -> None:
    for stage in STAGES.values():
        assert all(isinstance(out, str) for out in stage["outs"] if out), "plain outs are cached"
        for entry in [*stage.get("metrics", []), *stage.get("plots", [])]:
            ((_, options),) = entry.items()
            assert options["cache"] is False


def test_every_module_shapes_some_stage_or_the_command() -> None:
    """No module that nothing uses."""
    used = code.imported_files("cdm.cli").union(*(code.imported_files(f"stages.{name}") for name in NAMES))
    used |= {code.THE_FAMILY.replace("${teacher.family}", name) for name in family_names()}
    of_cdm = {
        str(path.relative_to(ROOT)) for path in code.modules().values() if path.is_relative_to(ROOT / "cdm")
    }
    empty = {name for name in of_cdm if name.endswith("__init__.py")}
    assert sorted(of_cdm - used - empty) == []


@pytest.mark.parametrize("name", MINIATURE)
def test_the_miniature_depends_on_its_own_scripts(name: str) -> None:
    stage = MINIATURE_STAGES[name]
    imported = {path for path in code.imported_files(f"miniature.{name}") if path.startswith("miniature/")}
    assert files(stage) == imported
    assert stage["cmd"] == f"python -m miniature.{name}"
    assert stage["params"] == [{"miniature/params.yaml": ["seed", name]}]


def test_the_miniature_stays_in_git() -> None:
    assert list(MINIATURE_STAGES) == MINIATURE
    for stage in MINIATURE_STAGES.values():
        for entry in [*stage["outs"], *stage.get("metrics", [])]:
            ((path, options),) = entry.items()
            assert options == {"cache": False}
            assert (ROOT / path).exists(), f"{path} is missing: the repository comes with it"


def md5(path: Path) -> str:
    """The hash of a file or a folder, as DVC counts it."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    inside = sorted(each for each in path.rglob("*") if each.is_file())
    listing = [{"md5": md5(each), "relpath": each.relative_to(path).as_posix()} for each in inside]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def test_a_fresh_clone_does_not_train_the_miniature() -> None:
    """The lock file that comes with the repository agrees with its files: `dvc repro` skips these stages."""
    locked = pipeline("miniature/dvc.lock")["stages"]
    params = pipeline("miniature/params.yaml")
    for name, stage in MINIATURE_STAGES.items():
        assert locked[name]["cmd"] == stage["cmd"]
        assert locked[name]["params"] == {"miniature/params.yaml": {key: params[key] for key in ("seed", name)}}
        assert {entry["path"] for entry in locked[name]["deps"]} == set(stage["deps"])
        assert {entry["path"] for entry in locked[name]["outs"]} == outs(stage)
        for entry in [*locked[name]["deps"], *locked[name]["outs"]]:
            assert md5(ROOT / entry["path"]) == entry["md5"], f"{entry['path']} differs from miniature/dvc.lock"
