"""Committing one's own results, and telling that a run has nothing to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cdm.errors import CdmError
from cdm.experiments import offline
from cdm.experiments.baseline import MESSAGE, commit_baseline, notice
from cdm.system.lock import is_cached, is_unchanged
from tests.experiment_sets import Project, quality

PIPELINE: dict[str, Any] = {
    "teacher": {
        "cmd": "python teacher.py",
        "deps": ["teacher.py", "${family}.py"],
        "params": ["family"],
        "outs": [{"data/teacher.json": {"persist": True}}],
    },
    "distill": {
        "cmd": "python distill.py",
        "deps": ["distill.py", "data/teacher.json"],
        "params": ["seed", "distill.lr"],
        "outs": ["models"],
        "plots": [{"log.csv": {"cache": False}}],
    },
    "evaluate": {
        "cmd": "python evaluate.py",
        "deps": ["models", "log.csv"],
        "metrics": [{"metrics/headline.json": {"cache": False}}],
    },
}
PARAMS: dict[str, Any] = {
    "seed": 0,
    "family": "sd3",
    "distill": {"lr": 1e-3, "ema": 0.9},
    "runtime": {"threads": 0},
}


def dump(path: Path, value: Any) -> None:
    with path.open("w") as file:
        YAML(typ="safe").dump(value, file)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline that has run, with the lock that DVC would have written."""
    for name in ("teacher.py", "sd3.py", "flux.py", "distill.py", "log.csv"):
        (tmp_path / name).write_text(name)
    for name in ("data", "models", "metrics"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/teacher.json").write_text("{}")
    (tmp_path / "metrics/headline.json").write_text("{}")
    dump(tmp_path / "dvc.yaml", {"stages": PIPELINE})
    dump(tmp_path / "params.yaml", PARAMS)
    write_lock(tmp_path)
    return tmp_path


def write_lock(folder: Path) -> None:
    hashes = {"models": "folder.dir"}

    def entry(path: str) -> dict[str, str]:
        return {"path": path, "md5": hashes.get(path) or md5(folder / path)}

    values = {"family": "sd3", "seed": 0, "distill.lr": 1e-3}
    stages = {}
    for name, stage in PIPELINE.items():
        outs = [
            out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots")
            for out in stage.get(kind, [])
        ]
        deps = [dep.replace("${family}", "sd3") for dep in stage["deps"]]
        params = {"params.yaml": {key: values[key] for key in stage.get("params", [])}}
        stages[name] = {
            "cmd": stage["cmd"],
            "deps": list(map(entry, deps)),
            "params": params,
            "outs": list(map(entry, outs)),
        }
    dump(folder / "dvc.lock", {"schema": "2.0", "stages": stages})


def test_a_pipeline_that_has_run_has_nothing_to_do(folder: Path) -> None:
    assert is_unchanged(folder)


def test_what_no_stage_reads_changes_nothing(folder: Path) -> None:
    dump(folder / "params.yaml", PARAMS | {"runtime": {"threads": 9}, "distill": {"lr": 1e-3, "ema": 0.5}})
    (folder / "flux.py").write_text("another")
    assert is_unchanged(folder)


def pipeline_with(folder: Path, **stages: Any) -> None:
    dump(folder / "dvc.yaml", {"stages": PIPELINE | stages})


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: dump(folder / "params.yaml", PARAMS | {"seed": 1}),
        lambda folder: dump(folder / "params.yaml", PARAMS | {"distill": {"lr": 2e-3}}),
        lambda folder: dump(folder / "params.yaml", PARAMS | {"distill": {}}),
        lambda folder: dump(folder / "params.yaml", PARAMS | {"family": "flux"}),
        lambda folder: (folder / "distill.py").write_text("another"),
        lambda folder: (folder / "data/teacher.json").write_text('{"another": 1}'),
        lambda folder: (folder / "distill.py").unlink(),
        lambda folder: (folder / "models").rmdir(),  # as in a clone, where all is still to be made
        lambda folder: (folder / "dvc.lock").unlink(),
        lambda folder: (folder / "dvc.lock").write_text("stages: {"),
        lambda folder: pipeline_with(folder, more={"cmd": "x"}),
        lambda folder: pipeline_with(folder, evaluate=PIPELINE["evaluate"] | {"cmd": "x"}),
        lambda folder: pipeline_with(folder, evaluate=PIPELINE["evaluate"] | {"deps": ["models"]}),
        lambda folder: pipeline_with(folder, evaluate=PIPELINE["evaluate"] | {"outs": ["models"]}),
    ],
)  # fmt: skip
def test_every_change_that_reruns_a_stage_is_seen(folder: Path, change: Any) -> None:
    change(folder)
    assert not is_unchanged(folder)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [(None, True), ("lock", False), ("listing", False), ("weights", False), ("edited", False)],
)
def test_a_folder_is_cached_where_lock_and_cache_hold_all_of_it(
    tmp_path: Path, lost: str | None, expected: bool
) -> None:
    contents = {"student.json": b"{}", "transformer/weights": b"w"}
    cache = tmp_path / "cache"

    def store(content: bytes, ending: str = "") -> str:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + ending
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        (cache / md5[:2] / md5[2:]).write_bytes(content)
        return md5

    for name, content in contents.items():
        (tmp_path / "models/student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models/student" / name).write_bytes(content)
    md5s = {name: store(content) for name, content in contents.items()}
    listing = store(json.dumps([{"md5": md5, "relpath": name} for name, md5 in md5s.items()]).encode(), ".dir")
    outs = [{"path": "logs/distill.csv", "md5": "0" * 32}, {"path": "models/student", "md5": listing}]
    dump(tmp_path / "dvc.lock", {"stages": {"teacher": {"cmd": "none"}, "distill": {"outs": outs}}})
    if lost == "lock":
        dump(tmp_path / "dvc.lock", {"stages": {"distill": {"outs": outs[:1]}}})
    elif lost == "listing":
        (cache / listing[:2] / listing[2:]).unlink()
    elif lost == "weights":
        (cache / md5s["transformer/weights"][:2] / md5s["transformer/weights"][2:]).unlink()
    elif lost == "edited":
        (tmp_path / "models/student/student.json").write_text("{} ")
    assert is_cached(Path("models/student/student.json"), cache, tmp_path) is expected
    assert not is_cached(Path("models/student/none.json"), cache, tmp_path)


@pytest.fixture
def project(folder: Path) -> Project:
    """The pipeline that has run, in Git, with results of another machine; then this machine's."""
    project = Project(folder)
    (folder / ".gitignore").write_text("/data/\n/models/\n")
    (folder / "metrics/quality.json").write_text(json.dumps(quality(1.0)))
    project.git("add", ".")
    project.git("commit", "--quiet", "--message", "theirs")
    return project


def run_pipeline(project: Project) -> None:
    """What a run leaves: another headline, a file that was not there, and the lock that belongs to them."""
    (project.folder / "metrics/headline.json").write_text('{"FD@4": 1}')
    (project.folder / "metrics/quality.csv").write_text("model\n")
    write_lock(project.folder)


def test_results_of_another_machine_are_named_and_committed_and_nothing_else(project: Project) -> None:
    assert notice(project.folder) == []
    run_pipeline(project)
    (project.folder / "notes.txt").write_text("of mine")
    first, second = notice(project.folder)
    assert "differ from those in Git" in first
    assert "make baseline" in second
    commit = commit_baseline(project.folder)
    assert project.git("log", "-1", "--format=%s") == MESSAGE
    assert project.git("rev-parse", "HEAD").startswith(commit)
    assert project.git("show", "--name-only", "--format=", "HEAD").splitlines() == [
        "dvc.lock", "metrics/headline.json", "metrics/quality.csv",
    ]  # fmt: skip
    assert project.git("status", "--porcelain") == "?? notes.txt"
    assert notice(project.folder) == []
    assert commit_baseline(project.folder) == ""


def test_what_dvc_has_staged_is_committed_too(project: Project) -> None:
    """With core.autostage it stages what it tracks."""
    run_pipeline(project)
    project.git("add", "dvc.lock", "metrics")
    assert len(notice(project.folder)) == 2
    assert commit_baseline(project.folder)
    assert project.git("status", "--porcelain") == ""


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["params.yaml", "distill.py"])
def test_results_of_something_else_are_no_baseline(project: Project, name: str, staged: bool) -> None:
    run_pipeline(project)
    with (project.folder / name).open("a") as file:
        file.write("\n# changed\n")
    if staged:
        project.git("add", name)
    head = project.git("rev-parse", "HEAD")
    assert notice(project.folder) == [], "they differ because something was changed"
    with pytest.raises(CdmError, match=f"{name}: changed, so that the results may not be those of the commit"):
        commit_baseline(project.folder)
    assert project.git("rev-parse", "HEAD") == head


def test_results_that_are_not_all_there_are_no_baseline(project: Project) -> None:
    run_pipeline(project)
    (project.folder / "models").rmdir()
    with pytest.raises(CdmError, match="run `make repro` first"):
        commit_baseline(project.folder)


def test_without_a_branch_a_baseline_would_be_lost(project: Project) -> None:
    """A killed `dvc exp run` leaves none checked out."""
    run_pipeline(project)
    project.git("checkout", "--quiet", "--detach")
    head = project.git("rev-parse", "HEAD")
    with pytest.raises(CdmError, match="no branch is checked out"):
        commit_baseline(project.folder)
    assert project.git("rev-parse", "HEAD") == head


def test_what_git_refuses_is_a_line(project: Project) -> None:
    run_pipeline(project)
    hook = project.folder / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'not on\na Friday' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(CdmError, match="git commit: not on a Friday") as caught:
        commit_baseline(project.folder)
    assert "\n" not in str(caught.value)


def test_outside_of_git_there_is_no_baseline(folder: Path) -> None:
    with pytest.raises(CdmError, match="in no Git repository"):
        commit_baseline(folder)


def test_the_page_of_dvcs_plots_asks_no_other_machine() -> None:
    """The template has DVC's places, and no address of the library, which stands in it."""
    page = offline.make_page("window.vegaEmbed = (place, spec) => [place, spec];")
    assert "window.vegaEmbed = (place, spec) => [place, spec];" in page
    assert "{plot_divs}" in page
    assert "{refresh_tag}" in page
    assert "{scripts}" not in page
    assert "{{" not in page
    assert "http" not in page


def test_without_a_dvc_project_there_are_no_plots(tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="no DVC project here"):
        offline.set_up(tmp_path / ".dvc")


def test_the_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    with pytest.raises(CdmError, match=r"pip install -e '\.\[plots\]'"):
        offline.set_up(tmp_path / ".dvc")
