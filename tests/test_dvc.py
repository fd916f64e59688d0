"""The pipeline's files say what the code does: what shapes each stage, and the parameters that it really reads."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cdm.families import family_names
from cdm.params import Params
from cdm.system import provenance
from tests import code

ROOT = Path(__file__).parent.parent
NAMES = ["teacher", "prompts", "latents", "distill", "sample", "evaluate"]
MINIATURE = ["real", "judge", "vae", "teacher"]


def pipeline(path: str) -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / path).read_text())


STAGES: dict[str, dict[str, Any]] = pipeline("dvc.yaml")["stages"]
MINIATURE_STAGES: dict[str, dict[str, Any]] = pipeline("miniature/dvc.yaml")["stages"]


def files(stage: dict[str, Any]) -> set[str]:
    """The dependencies of a stage that are code."""
    return {dep for dep in stage["deps"] if dep.startswith(("cdm/", "stages/"))}


def around(name: str) -> set[str]:
    """Modules that a stage imports and that shape nothing of it."""
    return set(provenance.SHAPES_NOTHING) - set(provenance.STAGES[name])


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
def test_the_list_of_what_shapes_a_stage_is_what_it_imports(name: str) -> None:
    """All of it, but for the modules that are said to shape nothing and what only they import."""
    imported, listed = code.imported_files(f"stages.{name}", around(name)), set(provenance.STAGES[name])
    assert sorted(imported - listed) == [], f"{name} imports what is in no list of cdm/system/provenance.py"
    assert sorted(listed - imported) == [], f"{name} lists what it does not import"


@pytest.mark.parametrize("name", NAMES)
def test_dvc_watches_what_shapes_a_stage(name: str) -> None:
    assert sorted(files(STAGES[name])) == sorted(provenance.STAGES[name])
    assert len(STAGES[name]["deps"]) == len(set(STAGES[name]["deps"]))


def test_every_listed_file_is_there_and_needed() -> None:
    imported = set[str]().union(
        *(code.imported_files(f"stages.{name}") for name in NAMES), {"cdm/system/git.py"}
    )
    assert set(provenance.SHAPES_NOTHING) <= imported
    for name in NAMES:
        assert all((ROOT / path).is_file() for path in provenance.code_files(name, "sd3"))


def test_the_digest_of_code_follows_what_shapes_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is: the family of the run and no other, and the version of diffusers."""
    shutil.copytree(ROOT / "cdm", tmp_path / "cdm", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)

    def changes(path: str) -> set[str]:
        before = {name: provenance.code_digest(name, "sd3") for name in NAMES}
        (tmp_path / path).write_text((tmp_path / path).read_text() + "# a comment\n")
        return {name for name in NAMES if provenance.code_digest(name, "sd3") != before[name]}

    assert changes("cdm/losses.py") == {"distill"}
    assert changes("cdm/families/sd3.py") == set(NAMES)
    assert changes("cdm/families/flux.py") == changes("cdm/errors.py") == set()
    before = provenance.code_digest("distill", "sd3")
    assert provenance.code_digest("distill", "flux") != before
    monkeypatch.setattr(provenance, "version", lambda package: f"{package} of tomorrow")
    assert provenance.code_digest("distill", "sd3") != before


def sections(keys: Iterable[str]) -> set[str]:
    return {key.split(".")[0] for key in keys}


@pytest.mark.parametrize("name", NAMES)
def test_params_are_the_keys_that_the_stage_declares_and_reads(name: str) -> None:
    """A stage that hands sections on reads them in its script; two need nearly all, and hand on the whole, as the first
    does, which checks for all others."""
    declared, read = code.keys_declared(f"stages.{name}"), code.keys_read(f"stages.{name}")
    assert declared == STAGES[name]["params"], "dvc.yaml and `with stage(...)` differ"
    undeclared = {key for key in read if not {key, *sections([key])} & {*declared, "runtime"}}
    assert undeclared == set(), f"stages/{name}.py reads what it does not declare"
    if code.passes_params(f"stages.{name}"):
        assert name in ("teacher", "distill", "evaluate")
    if name not in ("distill", "evaluate"):
        assert sections(declared) == sections(read) - {"runtime"}, (
            f"stages/{name}.py declares what it does not read"
        )


def test_the_stage_evaluate_declares_every_section_for_its_report() -> None:
    assert sorted(STAGES["evaluate"]["params"]) == sorted(set(Params.model_fields) - {"runtime"})


def test_the_code_of_the_training_reads_no_section_that_does_not_shape_it() -> None:
    """Its functions take the whole parameters: none of its files may read a section that DVC does not watch."""
    paths = [path for path in provenance.STAGES["distill"] if path.startswith("cdm/training/")]
    read = {path: sections(code.keys_read(path.removesuffix(".py").replace("/", "."))) for path in paths}
    assert {"distill", "schedule", "seed"} <= set[str]().union(*read.values())
    shaping = {*sections(STAGES["distill"]["params"]), "runtime"}
    assert {path: found - shaping for path, found in read.items() if found - shaping} == {}


def test_a_student_is_named_by_the_params_that_dvc_watches() -> None:
    """A change that reruns `distill` begins another training, and no other change does."""
    from cdm.training.identity import SHAPING

    keys = [f"{name}.{key}" for name, inside in SHAPING.items() if isinstance(inside, set) for key in inside]
    keys += [name for name, inside in SHAPING.items() if inside is True]
    assert sorted(keys) == sorted(STAGES["distill"]["params"])


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
    written = outs(STAGES[name])
    assert {path for path in written if not inside(path, defaults)} == set()
    between = {path for other in NAMES for path in outs(STAGES[other])}
    deps = {dep.replace("${distill.probe.reference}", "latents") for dep in STAGES[name]["deps"]}
    read = {dep for dep in deps & between if not dep.startswith("data/inputs/")}
    assert {path for path in read if not inside(path, defaults)} == set()
    for default in defaults:
        assert not inside(default, {"data"}) or any(inside(path, {default}) for path in read | written), default


def inside(path: str, folders: set[str]) -> bool:
    """Whether a path is one of `folders`, or in one."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


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
    assert set(names) == {"teacher.family", "distill.probe.reference"}
    for name in names:
        assert isinstance(reduce(getitem, name.split("."), values), str)


def test_what_a_section_reruns() -> None:
    """The point of granular params: a change reaches the stages that read it, and those after them.

    It may stop there, where what a stage writes stays the same (tests/test_pipeline.py).
    """

    def reruns(section: str) -> list[str]:
        stale: set[str] = set()
        for name in NAMES[1:]:  # in the order of the pipeline; `teacher` is asked in any case
            stage = STAGES[name]
            inputs = {path for other in stale for path in outs(STAGES[other])}
            if section in stage["params"] or inputs & set(stage["deps"]):
                stale.add(name)
        return sorted(stale, key=NAMES.index)

    assert reruns("schedule") == ["distill", "sample", "evaluate"]
    assert reruns("distill") == ["distill", "sample", "evaluate"]
    assert reruns("sample") == ["sample", "evaluate"]
    assert reruns("evaluate") == ["evaluate"]
    assert reruns("teacher") == ["latents", "distill", "sample", "evaluate"], "which model it is, is in an out"
    assert reruns("prompts") == NAMES[1:]


def test_only_the_stage_that_looks_outside_is_asked_every_time() -> None:
    assert [name for name, stage in STAGES.items() if stage.get("always_changed")] == ["teacher"]


def test_metrics_and_plots_are_in_git_and_everything_else_in_the_cache() -> None:
    for stage in STAGES.values():
        for out in stage["outs"]:
            assert isinstance(out, str) or all(options == {"persist": True} for options in out.values())
        for entry in [*stage.get("metrics", []), *stage.get("plots", [])]:
            ((_, options),) = entry.items()
            assert options["cache"] is False


def test_every_module_shapes_some_stage_or_the_command() -> None:
    """No module that nothing uses: the commands, the stages, or the library's own interface."""
    roots = ["cdm.cli", "cdm.training.session", *(f"stages.{name}" for name in NAMES)]
    used = set[str]().union(*map(code.imported_files, roots))
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
    assert {f"miniature/{dep}" for dep in stage["deps"] if dep.endswith(".py")} == imported
    assert stage["cmd"] == f"cd .. && python -m miniature.{name}"
    assert stage["params"] == ["seed", name]


def test_the_miniature_stays_in_git() -> None:
    assert list(MINIATURE_STAGES) == MINIATURE
    for stage in MINIATURE_STAGES.values():
        for entry in [*stage["outs"], *stage.get("metrics", [])]:
            ((path, options),) = entry.items()
            assert options == {"cache": False}
            assert (ROOT / "miniature" / path).exists(), f"{path} is missing: the repository comes with it"


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
        assert locked[name]["params"] == {"params.yaml": {key: params[key] for key in ("seed", name)}}
        assert {entry["path"] for entry in locked[name]["deps"]} == set(stage["deps"])
        assert {entry["path"] for entry in locked[name]["outs"]} == outs(stage)
        for entry in [*locked[name]["deps"], *locked[name]["outs"]]:
            assert md5(ROOT / "miniature" / entry["path"]) == entry["md5"], (
                f"{entry['path']} is another than locked"
            )


@pytest.mark.parametrize("folder", ["comparison", "judging", "miniature"])
def test_another_pipeline_is_a_project_of_its_own(folder: str) -> None:
    """So that DVC, asked in the repository, speaks of the six stages alone."""
    assert (ROOT / folder / ".dvc/config").read_text() == (ROOT / ".dvc/config").read_text()
    assert (ROOT / folder / ".dvcignore").is_file()
    assert not any(folder in dep for stage in STAGES.values() for dep in stage["deps"])


def test_a_fresh_clone_runs_no_cell_of_the_comparison() -> None:
    """Of what is in Git; the data that all cells share are made by the repository's own pipeline."""
    locked, own = pipeline("comparison/dvc.lock")["stages"], pipeline("dvc.lock")["stages"]
    cells = {name: stage for name, stage in locked.items() if "@" in name or name == "teacher"}
    assert len(cells) == len(list((ROOT / "comparison/results").rglob("*.json"))) > 80
    for name, stage in cells.items():
        for entry in [*stage["deps"], *stage["outs"]]:
            if entry["path"] != "pairs" and not entry["path"].startswith("../data/"):
                path = ROOT / "comparison" / entry["path"]
                assert md5(path) == entry["md5"], f"{name}: {entry['path']} is another than locked"
    made = {entry["path"]: entry["md5"] for stage in own.values() for entry in stage["outs"]}

    def shared(path: str) -> set[str]:
        return {
            each["md5"] for stage in cells.values() for each in stage["deps"] if each["path"] == f"../{path}"
        }

    assert shared("data/teacher.json") == {made["data/teacher.json"]}, "the cells are of another teacher"
    # Latents are rounded as the processor does it, and the cells need not be of the one that dvc.lock is of.
    assert len(shared("data/latents")) == 1, (
        "the cells were not all measured on the same samples of the teacher"
    )
