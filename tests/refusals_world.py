"""The small repository of `tests/refusals.py`: a pipeline of tiny parameters that has run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests import tiny_pipelines

ROOT = Path(__file__).parent.parent
STAGES = ("teacher", "prompts", "latents", "distill", "sample")
"""But for `evaluate`, whose pictures take their time."""
STUDENT = Path("models/student")
PARAMS: dict[str, Any] = {
    "seed": 0,
    "teacher": {"family": "sd3", "source": "teacher", "guidance_scale": 3.0},
    "prompts": {
        "train": ["lists/train.txt"], "eval": ["lists/eval.txt"], "eval_count": 4, "max_sequence_length": 0,
    },
    "latents": {"steps": 2, "per_prompt": 2},
    "schedule": {"kind": "dynamic", "min_len": 1, "max_len": 2, "sigma_min": 0.1, "sigma_max": 0.9},
    "distill": {
        "iterations": 2, "batch_size": 2, "student_every": 2,
        "losses": {"ca": {"weight": 1.0, "scale": 1.0}, "dm": {"weight": 1.0}, "cdm": {"weight": 1.0}},
        "student": {"lr": 1e-3}, "fake": {"lr": 1e-3},
    },
    "sample": {"steps": [1], "teacher_steps": [], "pictures": 1},
    "evaluate": {"judge": "judge", "real": "real.safetensors", "neighbours": 2},
    "runtime": {"device": "cpu", "batch_size": 16, "pictures_every": 0},
}  # fmt: skip


def as_yaml(values: Any) -> str:
    """JSON, which is YAML but for the numbers that are none."""
    return json.dumps(values, indent=1).replace("Infinity", ".inf").replace("NaN", ".nan")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters with some of them set, by dotted key."""
    values = deepcopy(PARAMS)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section: Any = values
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def teacher(folder: Path) -> Path:
    return tiny_pipelines.save("sd3", folder)


def build(folder: Path, teacher: Path, call: Callable[[tuple[str, ...], Path], Any]) -> Path:
    """The repository, made by the stages, which `call` runs."""
    (folder / "lists").mkdir(parents=True)
    (folder / "teacher").symlink_to(teacher)
    (folder / "judge").symlink_to(ROOT / "miniature/judge")
    (folder / "real.safetensors").symlink_to(ROOT / "miniature/data/real.safetensors")
    for name, count in (("train", 6), ("eval", 4)):
        lines = (ROOT / f"miniature/data/{name}.txt").read_text().splitlines()[:count]
        (folder / f"lists/{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "params.yaml").write_text(as_yaml(PARAMS))
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("*.txt"))
    for stage in STAGES:
        done = call((f"stages.{stage}",), folder)
        assert done.code == 0, f"{stage}: {done.err}{done.traceback}"
        assert not done.traceback, done.traceback
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(ROOT / "metrics", folder / "metrics")
    for name in ("plots/overview.png", "report/index.html"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return folder


def copy(made: Path, folder: Path) -> Path:
    """A copy of a world, whose links lead where they did."""
    return Path(shutil.copytree(made, folder, symlinks=True))


def remove(folder: Path) -> None:
    """Deletes a copy, whatever permissions have been taken from it."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(place, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)
