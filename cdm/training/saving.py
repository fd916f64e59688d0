"""Writing what a training has made: the student and the log."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm.errors import CdmError
from cdm.models.student import FULL, LORA, Origin
from cdm.params import Params
from cdm.system.writing import placed
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


def check_place(folder: Path) -> None:
    """Raises CdmError if `folder` is there and holds anything but a student, which a new one would replace."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CdmError(f"{folder}: a file is in the way: move it away, or choose another folder")
    if any(folder.iterdir()) and not any((folder / name).exists() for name in (LORA, FULL)):
        raise CdmError(f"{folder}: holds other things than a student: move it away, or choose another folder")


def save_student(
    networks: Networks,
    average: Mapping[str, Tensor],
    inputs: Inputs,
    params: Params,
    folder: Path,
    training: str = "",
) -> None:
    """The moving average of the student, with the record of what it was made from: a pipeline folder of the teacher's
    kind, or a LoRA for the teacher. `training` is the name of the folder of its checkpoints. A sharded average is made
    whole tensor by tensor: the other processes lend their slices (`sharding.lend`).

    An older student in `folder` is replaced, whatever it was: nothing of it is left. Raises CdmError as `check_place`.
    """
    check_place(folder)
    record = FULL if params.distill.lora is None else LORA
    with placed(folder) as staged:
        networks.save_student(average, inputs.source, staged)
        Origin.from_training(inputs.teacher, params, training).write(staged / record)
