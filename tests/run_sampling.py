"""The stages `latents` and `sample` in a process of their own: `python -m tests.run_sampling WORLD`.

WORLD holds params.json, teacher.json, prompts/ and student/ (see test_processes.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cdm.data import sampling
from cdm.models.manifest import TeacherManifest
from cdm.params import parse
from tests.inputs import cache_latents, draw_samples

ROWS = 4
"""Rows of a shard, so that there are several."""


def draw(world: Path) -> None:
    params = parse(json.loads((world / "params.json").read_text()))
    teacher = TeacherManifest.read(world / "teacher.json")
    cache_latents(params, teacher, world / "prompts", world / "latents")
    folders = (world / name for name in ("student", "prompts", "latents", "samples"))
    draw_samples(params, teacher, *folders)


if __name__ == "__main__":
    sampling.shard_rows = lambda _: ROWS
    draw(Path(sys.argv[1]))
