"""The whole pipeline in a repository of its own, through DVC itself, on a teacher of random weights.

What comes out is noise; that every stage runs, that results are where they belong, and that a change reruns what it
touches and nothing else, is what is tested here.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cdm.models.student import student_hashes
from cdm.system import provenance
from cdm.system.files import digest_of
from tests.repository import Repository, make_repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository with tiny parameters, in a path with a space, after its first `dvc repro`."""
    folders = (tmp_path_factory.mktemp(name) for name in ("a clone", "home"))
    repository = make_repository(*folders, tiny_sd3)
    assert repository.stages_run("repro") == ["teacher", "prompts", "latents", "distill", "sample", "evaluate"]
    return repository


def test_the_pipeline_leaves_its_results(repository: Repository) -> None:
    folder = repository.folder
    quality = json.loads((folder / "metrics/quality.json").read_text())
    assert {name: row["evaluations"] for name, row in quality["student"].items()} == {"steps1": 1, "steps2": 2}
    assert {name: row["evaluations"] for name, row in quality["teacher"].items()} == {"steps1": 2, "steps3": 6}
    for row in [*quality["student"].values(), *quality["teacher"].values()]:
        assert row["frechet_distance"] > 0
        assert row["style_distance"] > 0
        assert 0 <= row["attribute_accuracy"] <= 1
    assert quality["basis"]["student"] == digest_of(student_hashes(folder / "models/student"))
    with (folder / "logs/distill.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["2", "4", "6"]
    headline = json.loads((folder / "metrics/headline.json").read_text())
    assert list(headline) == [
        "FD@1", "FD@2", "right@1", "right@2", "teacher FD@3", "teacher right@3", "train seconds", "train forwards",
    ]  # fmt: skip
    times = json.loads((folder / "logs/timing.json").read_text())
    assert headline["train seconds"] == pytest.approx(times["seconds"], rel=1e-3)
    assert (folder / "report/index.html").stat().st_size > 1000
    assert (folder / "plots/overview.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").glob("distill-*/*"))


def test_the_student_loads_with_diffusers(repository: Repository) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        repository.folder / "models/student", text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red three on black paper", sigmas=[1.0, 0.5], guidance_scale=1.0, max_sequence_length=0
    ).images[0]
    assert image.size == (32, 32)


def test_results_are_recorded_and_nothing_is_left_in_git_by_accident(repository: Repository) -> None:
    """What DVC caches is ignored by Git; lock, metrics, log and plots are what a run adds to it."""
    changes = repository.run("git", "status", "--porcelain", "--untracked-files=normal").splitlines()
    assert {line[3:].split("/")[0] for line in changes} == {"dvc.lock", "logs", "metrics", "plots"}
    assert not any("timing" in line for line in changes)
    again = repository.dvc("repro")
    assert re.findall(r"^Running stage '([^']+)':$", again, re.MULTILINE) == ["teacher"]
    assert "nothing has changed since the last run" in again
    assert json.loads(repository.dvc("status", "--json")) == {"teacher": ["always changed"]}


WITH_FAMILY = {"prompts", "latents", "distill", "sample", "evaluate"}
EXPECTED: dict[str, set[str]] = {
    "cdm/losses.py": {"distill"},
    "cdm/evaluation/distances.py": {"distill", "evaluate"},
    "cdm/evaluation/sheets.py": {"evaluate"},
    "cdm/families/sd3.py": WITH_FAMILY,
    "cdm/families/longcat.py": set(),
    "cdm/data/prompts.py": {"prompts"},
    "cdm/data/prompt_set.py": {"latents", "distill", "sample", "evaluate"},
    "cdm/data/sampling.py": {"latents", "sample"},
    "cdm/external.py": set(),
    "cdm/errors.py": set(),
    "cdm/params.py": set(),
    "cdm/preflight.py": set(),
    "cdm/models/hub.py": set(),
    "cdm/models/manifest.py": set(),
    "cdm/system/launcher.py": set(),
    "cdm/system/progress.py": set(),
    "cdm/system/provenance.py": set(),
    "cdm/training/checkpoint.py": set(),
    "cdm/training/pictures.py": set(),
    "cdm/training/watch.py": set(),
    "cdm/cli.py": set(),
    "cdm/handover/export.py": set(),
    "cdm/handover/snippet.py": {"evaluate"},
    "cdm/planning/plan.py": set(),
    "stages/common.py": set(),
    "stages/sample.py": {"sample"},
}
"""Some modules, and the stages that a change of them makes stale."""


def test_every_module_makes_those_stages_stale_that_it_shapes(repository: Repository) -> None:
    """DVC itself is asked, for one module after the other."""
    modules = [path for top in ("cdm", "stages") for path in sorted((repository.folder / top).rglob("*.py"))]
    names = [path.relative_to(repository.folder).as_posix() for path in modules]
    found = repository.changed_by(names)
    for name in names:
        listed = {stage for stage in provenance.STAGES if name in provenance.code_files(stage, "sd3")}
        assert found[name] == listed - {"teacher"}, name
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert repository.changed() == set()


def params_with(repository: Repository, section: str, **changes: Any) -> None:
    path = repository.folder / "params.yaml"
    values = YAML(typ="safe").load(path.read_text())
    values[section].update(changes)
    with path.open("w") as file:
        YAML(typ="safe").dump(values, file)


def test_evaluation_prompts_do_not_rerun_the_training(repository: Repository) -> None:
    """Fewer of them, and then other ones: training reads neither."""
    others = ["teacher", "prompts", "latents", "sample", "evaluate"]
    params_with(repository, "prompts", eval_count=3)
    assert repository.stages_run("repro") == others
    lines = (repository.folder / "world/eval.txt").read_text().splitlines()
    other = repository.folder / "world/other.txt"
    other.write_text("\n".join(reversed(lines[:4])))
    params_with(repository, "prompts", eval=["world/other.txt", "world/eval.txt"])
    assert repository.stages_run("repro") == others
    other.unlink()
    params_with(repository, "prompts", eval=["world/eval.txt"], eval_count=4)
    assert repository.stages_run("repro") == ["teacher"], "all of it is in the cache"


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("world/eval.txt", ["teacher", "prompts"]),
        ("world/judge/config.json", ["teacher", "evaluate"]),
    ],
)
def test_a_change_behind_a_path_reruns_what_reads_it(
    repository: Repository, path: str, stages: list[str]
) -> None:
    """A line at the end that changes nothing of what is read: DVC goes on to where a result stays the same."""
    file = repository.folder / path
    before = file.read_text()
    file.write_text(before + "\n")
    try:
        assert repository.stages_run("repro") == stages
    finally:
        file.write_text(before)
    assert repository.stages_run("repro") == ["teacher"]


def test_the_teacher_is_read_again_only_where_it_changed(repository: Repository) -> None:
    config = repository.folder / "world/teacher/transformer/config.json"
    before = config.read_text()
    config.touch()
    assert repository.stages_run("repro") == ["teacher"]
    config.write_text(before + "\n")
    try:
        assert repository.stages_run("repro", "prompts") == ["teacher", "prompts"]
    finally:
        config.write_text(before)
    assert repository.stages_run("repro") == ["teacher"], "as it was: all of it is in the cache"


def test_a_probe_makes_the_latents_an_input_of_the_training(repository: Repository) -> None:
    assert repository.stages_run(
        "exp", "run", "-S", "distill.probe.reference=latents", "-S", "distill.probe.samples=4", "distill"
    ) == ["teacher", "distill"]
    with (repository.folder / "logs/distill.csv").open() as file:
        assert list(csv.DictReader(file))[-1]["probe"]
    repository.run("git", "restore", "--staged", "--worktree", "params.yaml")
    assert repository.stages_run("repro") == ["teacher"]


def test_experiments_rerun_what_they_change(repository: Repository) -> None:
    """From a baseline of one's own, and back to it."""
    commit = repository.run(sys.executable, "-m", "cdm.cli", "baseline").split(":")[0]
    assert repository.run("git", "rev-parse", "HEAD").startswith(commit)
    changed = repository.dvc("exp", "run", "--name", "longer", "-S", "schedule.max_len=3")
    assert re.findall(r"^Running stage '([^']+)':$", changed, re.MULTILINE) == [
        "teacher", "distill", "sample", "evaluate",
    ]  # fmt: skip
    assert "nothing has changed" not in changed
    assert repository.stages_run("exp", "run", "-S", "sample.steps=[2]") == ["teacher", "sample", "evaluate"]
    quality = json.loads((repository.folder / "metrics/quality.json").read_text())
    assert set(quality["student"]) == {"steps2"}
    in_vain = repository.dvc("exp", "run", "-S", "sample.steps=[2]")
    assert "nothing has changed since the last run" in in_vain
    # What DVC shows by itself: short names, and nothing but the headline.
    table = repository.dvc("exp", "show", "--only-changed", "--md")
    assert "schedule.max_len" in table
    assert "| FD@1 " in table
    assert "evaluations" not in table
    difference = repository.dvc("exp", "diff", "main", "longer")
    assert max(map(len, difference.splitlines())) <= 120
    assert "FD@1" in difference
    data = json.loads(repository.dvc("plots", "diff", "main", "longer", "--json"))["data"]
    (curves,) = data["metrics/quality.csv"]
    assert {"main", "longer"} <= set(curves["revisions"])
    # And what it does not: what was changed first, and the pictures of all.
    table = repository.run(sys.executable, "-m", "cdm.cli", "compare", "--brief")
    assert re.search(r"^longer +max_len=3 ", table, re.MULTILINE)
    text = repository.run(sys.executable, "-m", "cdm.cli", "compare", "main", "longer")
    assert "schedule.max_len  2 → 3" in text
    assert "no pictures" not in text
    page = (repository.folder / "compare.html").read_text()
    assert page.count('src="data:image/png') > 10
    # Back to the commit: everything comes from the cache.
    repository.run("git", "restore", "params.yaml")
    assert repository.stages_run("repro") == ["teacher"]
    assert repository.run("git", "status", "--porcelain") == ""
