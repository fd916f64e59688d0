"""Writing what a training has made: the student and the log."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm.models.student import FULL, LORA, Origin
from cdm.params import Params
from cdm.training.inputs import Inputs
from cdm.training.networks import Networks


def write_log(rows: list[dict[str, Any]], path: Path) -> None:
    """The log as CSV; a round without a student update leaves its cells empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_student(
    networks: Networks,
    average: dict[str, Tensor],
    inputs: Inputs,
    params: Params,
    folder: Path,
    training: str = "",
) -> None:
    """The moving average of the student, with the record of what it was made from: a pipeline folder of the teacher's
    kind, or a LoRA for the teacher. `training` is the name of the folder of its checkpoints."""
    (folder / LORA).unlink(missing_ok=True)
    networks.save_student(average, inputs.source, folder)
    record = FULL if params.distill.lora is None else LORA
    Origin.from_training(inputs.teacher, params, training).write(folder / record)
