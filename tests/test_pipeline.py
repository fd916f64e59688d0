"""The whole pipeline in a repository of its own, through DVC itself, on a teacher of random weights.

What comes out is noise; that every stage runs, that results are where they belong, and that a change reruns what it
touches and nothing else, is what is tested here.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
COPIED = ("cdm", "stages", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/.gitignore", ".dvc/config")
TINY: dict[str, Any] = {
    "teacher": {"source": "world/teacher", "track": "world/teacher"},
    "prompts": {"train": ["world/train.txt"], "eval": ["world/eval.txt"], "track": "world", "eval_count": 4},
    "latents": {"steps": 3, "per_prompt": 4},
    "schedule": {"min_len": 1, "max_len": 2},
    "distill": {"iterations": 6, "batch_size": 4, "student_every": 2, "fake_only": 2},
    "sample": {"steps": [1, 2], "teacher_steps": [1], "pictures": 2},
    "evaluate": {"judge": "world/judge", "real": "world/real.safetensors"},
}


class Repository:
    """A Git and DVC repository, and its commands."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DVC_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.org",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.org",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            check=False,
            cwd=self.folder,
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=1200,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def stages_run(self, *arguments: str) -> list[str]:
        """The stages that a command of DVC ran, in order."""
        return re.findall(r"^Running stage '(\w+)':$", self.dvc(*arguments), re.MULTILINE)

    def changed(self) -> set[str]:
        """The stages whose own inputs have changed."""
        return set(json.loads(self.dvc("status", "--json")))


@pytest.fixture(scope="module")
def repository(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository with tiny parameters, after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(tiny_sd3, folder / "world/teacher")
    shutil.copytree(ROOT / "miniature/judge", folder / "world/judge")
    for name in ("train.txt", "eval.txt", "real.safetensors"):
        shutil.copy(ROOT / "miniature/data" / name, folder / "world" / name)
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    for section, values in TINY.items():
        params[section].update(values)
    params["evaluate"]["track"] = [params["evaluate"]["judge"], params["evaluate"]["real"]]
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)

    repository = Repository(folder, tmp_path_factory.mktemp("home"))
    repository.run("git", "init", "--quiet")
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "tiny")
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
        ("cdm/watch.py", set()),
        ("stages/sample.py", {"sample"}),
        ("cdm/prompts.py", {"prompts", "latents", "distill", "sample", "evaluate"}),
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
