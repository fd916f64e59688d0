"""The whole pipeline in a repository of its own, through DVC itself, on a teacher of random weights.

What comes out is noise; that every stage runs, that results are where they belong, and that a change reruns what it
touches and nothing else, is what is tested here.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.repository import Repository, make_repository


@pytest.fixture(scope="module")
def repository(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository with tiny parameters, after its first `dvc repro`."""
    folders = (tmp_path_factory.mktemp(name) for name in ("pipeline", "home"))
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
    with (folder / "logs/distill.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["2", "4", "6"]
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
    assert repository.changed() == set()
    assert repository.stages_run("repro") == []


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("cdm/losses.py", {"distill"}),
        ("cdm/evaluation/distances.py", {"distill", "evaluate"}),
        ("cdm/evaluation/sheets.py", {"evaluate"}),
        ("cdm/training/watch.py", set()),
        ("cdm/families/sd3.py", {"teacher", "prompts", "latents", "distill", "sample", "evaluate"}),
        ("cdm/families/longcat.py", set()),
        ("stages/sample.py", {"sample"}),
        ("cdm/data/prompts.py", {"prompts", "latents", "distill", "sample", "evaluate"}),
    ],
)
def test_a_comment_in_a_module_touches_the_stages_that_import_it(
    repository: Repository, module: str, stages: set[str]
) -> None:
    path = repository.folder / module
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"# a comment\n")
        assert repository.changed() == stages
    finally:
        path.write_bytes(before)


def test_experiments_rerun_what_they_change(repository: Repository) -> None:
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "results")
    assert repository.stages_run("exp", "run", "-S", "schedule.max_len=3") == ["distill", "sample", "evaluate"]
    assert repository.stages_run("exp", "run", "-S", "sample.steps=[2]") == ["sample", "evaluate"]
    quality = json.loads((repository.folder / "metrics/quality.json").read_text())
    assert set(quality["student"]) == {"steps2"}
    table = repository.dvc("exp", "show", "--only-changed", "--drop", "stages|data|models|cdm", "--md")
    assert "schedule.max_len" in table
    assert "student.steps2.style_distance" in table
    # Back to the commit: everything comes from the cache.
    repository.run("git", "restore", "params.yaml")
    assert repository.stages_run("repro") == []
    assert repository.run("git", "status", "--porcelain") == ""
