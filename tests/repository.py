"""A repository of the pipeline with tiny parameters, and its commands, for tests through DVC itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.launching import python

ROOT = Path(__file__).parent.parent
COPIED = (
    "cdm",
    "stages",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvc/plots",
)
TINY: dict[str, Any] = {
    "teacher": {"source": "world/teacher"},
    "prompts": {"train": ["world/train.txt"], "eval": ["world/eval.txt"], "eval_count": 4},
    "latents": {"steps": 3, "per_prompt": 4},
    "schedule": {"min_len": 1, "max_len": 2},
    "distill": {
        "iterations": 6,
        "batch_size": 4,
        "student_every": 2,
        "fake_only": 2,
        "fake_knows_level": False,
    },
    "sample": {"steps": [1, 2], "teacher_steps": [1], "pictures": 2},
    "evaluate": {"judge": "world/judge", "real": "world/real.safetensors"},
    "runtime": {"pictures_every": 0},
}


class Repository:
    """A Git and DVC repository, and its commands."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DVC_"))},
            "PATH": os.pathsep.join(
                map(str, (python().parent, Path(sys.executable).parent, os.environ["PATH"]))
            ),
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
        return self.run("python", "-m", "dvc", *arguments)

    def stages_run(self, *arguments: str) -> list[str]:
        """The stages that a command of DVC ran, in order."""
        return re.findall(r"^Running stage '([^']+)':$", self.dvc(*arguments), re.MULTILINE)

    def changed(self) -> set[str]:
        """The stages whose own inputs have changed, but for `teacher`, which is always asked."""
        return set(json.loads(self.dvc("status", "--json"))) - {"teacher"}

    def changed_by(self, paths: Sequence[str]) -> dict[str, set[str]]:
        """For each of some text files the stages that become stale by a line that is added to it, but for `teacher`.

        DVC is asked once, with all of them changed: it names the inputs of a stage that are others. AssertionError
        if it names anything else, such as a folder, whose change could be that of any file in it.
        """
        before = {path: (self.folder / path).read_bytes() for path in paths}
        try:
            for path, content in before.items():
                (self.folder / path).write_bytes(content + b"# a comment\n")
            status: dict[str, list[Any]] = json.loads(self.dvc("status", "--json"))
        finally:
            for path, content in before.items():
                (self.folder / path).write_bytes(content)
        found = {path: set[str]() for path in paths}
        for stage in status.keys() - {"teacher"}:
            for problem in status[stage]:
                assert problem.keys() == {"changed deps"}, (stage, problem)
                for path, change in problem["changed deps"].items():
                    assert change == "modified", (stage, path, change)
                    found[path].add(stage)
        return found


def make_repository(folder: Path, home: Path, teacher: Path, *also: str) -> Repository:
    """The pipeline in `folder`, of the diffusers folder `teacher`, committed and not yet run; `also` is copied too."""
    for name in (*COPIED, *also):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*", "tmp", "cache")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(teacher, folder / "world/teacher")
    shutil.copytree(ROOT / "miniature/judge", folder / "world/judge")
    for name in ("train.txt", "eval.txt", "real.safetensors"):
        shutil.copy(ROOT / "miniature/data" / name, folder / "world" / name)
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    for section, values in TINY.items():
        params[section].update(values)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)

    repository = Repository(folder, home)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "tiny")
    return repository
