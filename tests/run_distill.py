"""Runs a distillation in a process of its own: `python -m tests.run_distill WORLD OUT CHECKPOINTS`.

WORLD holds params.yaml, teacher.json and prompts/ (see the fixture `world` of test_training.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from cdm.errors import CdmError
from cdm.models.manifest import TeacherManifest
from cdm.params import load
from cdm.training.inputs import Inputs
from cdm.training.loop import distill
from cdm.training.watch import Places

if __name__ == "__main__":
    world, out, checkpoints = (Path(argument) for argument in sys.argv[1:4])
    params = load(world / "params.yaml")
    inputs = Inputs.gather(params, TeacherManifest.read(world / "teacher.json"), world / "prompts")
    student, log = out / "student", out / "log.csv"
    places = Places(out / "pictures", out / "timing.json", out / "trackers")
    try:
        distill(params, inputs, checkpoints=checkpoints, student=student, log=log, places=places)
    except CdmError as error:
        sys.exit(f"error: {error}")
