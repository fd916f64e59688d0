"""A params file of a distillation that takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from cdm.params import Params, load

ITERATIONS = 24


def write_params(folder: Path, teacher: Path, **distill_changes: Any) -> Params:
    lists = folder / "train.txt"
    lists.write_text(
        "".join(f"a {ink} three on black paper\n" for ink in ("red", "green", "blue", "pink", "cyan"))
    )
    values: dict[str, Any] = {
        "seed": 5,
        "teacher": {"family": "sd3", "source": str(teacher), "guidance_scale": 2.0},
        "prompts": {"train": [str(lists)], "eval_count": 1, "max_sequence_length": 0},
        "latents": {"steps": 2, "per_prompt": 1},
        "schedule": {"kind": "dynamic", "min_len": 1, "max_len": 4, "sigma_min": 0.1, "sigma_max": 0.9},
        "distill": {
            "iterations": ITERATIONS,
            "batch_size": 4,
            "fake_only": 4,
            "losses": {
                "ca": {"weight": 1.0, "scale": 1.0},
                "dm": {"weight": 1.0},
                "cdm": {"weight": 1.0},
            },
            "student": {"lr": 1e-3, "warmup": 4, "decay_from": 0.5},
            "fake": {"lr": 1e-3, "warmup": 4},
            **distill_changes,
        },
        "sample": {"steps": [1], "teacher_steps": [1]},
        "evaluate": {},
        "runtime": {"device": "cpu", "checkpoint_every": 4, "pictures_every": 0},
    }
    YAML().dump(values, folder / "params.yaml")
    return load(folder / "params.yaml")
