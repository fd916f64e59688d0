"""A student on this disk: a whole pipeline, or a LoRA beside the name of the teacher that it is for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm.errors import CdmError
from cdm.families import Family, family_of_pipeline, get_family
from cdm.hub import TeacherManifest, pipeline_class, resolve
from cdm.store import write_json

LORA = "lora.json"
"""Where a student is a LoRA: the teacher's family, source, revision and digest."""


@dataclass(frozen=True)
class Model:
    """Something to draw with: the diffusers folder `base`, with the LoRA in the folder `lora` if there is one."""

    family: Family
    base: Path
    lora: Path | None = None

    def load(self, **options: Any) -> Any:
        """The pipeline, by `Family.load_pipeline` with these options. Raises CdmError."""
        pipeline = self.family.load_pipeline(self.base, **options)
        if self.lora is not None:
            self.family.load_lora(pipeline, self.lora)
        return pipeline


def write_marker(folder: Path, teacher: TeacherManifest) -> None:
    """Says in a LoRA's folder which teacher it is for."""
    named = {"family": teacher.family, "source": teacher.source, "revision": teacher.revision}
    write_json(folder / LORA, {**named, "digest": teacher.digest})


def find_student(folder: Path, teacher: TeacherManifest | None = None) -> Model:
    """The student in `folder`; of this `teacher`, if given.

    Raises CdmError if it is missing, of another family, or a LoRA for another teacher or one that is not there.
    """
    if not folder.is_dir():
        raise CdmError(
            f"{folder}: no student there: run `dvc repro` (or the stage `distill`), or name its folder"
        )
    marker = _marker(folder)
    family = get_family(marker["family"]) if marker else family_of_pipeline(pipeline_class(folder))
    if teacher is not None and family.name != teacher.family:
        raise CdmError(f"{folder}: a student of the family {family.name}, but the teacher is {teacher.family}")
    if marker is None:
        return Model(family, folder)
    if teacher is not None:
        if marker["digest"] != teacher.digest:
            raise CdmError(f"{folder}: a LoRA for another teacher: run the stage `distill` again")
        return Model(family, teacher.folder(), folder)
    try:
        return Model(family, resolve(marker["source"], marker["revision"]), folder)
    except CdmError as error:
        raise CdmError(f"{folder}: a LoRA for {marker['source']}, which is not to be had: {error}") from None


def _marker(folder: Path) -> dict[str, Any] | None:
    path = folder / LORA
    if not path.exists():
        return None
    try:
        marker: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("family", "source", "revision", "digest"):
            marker[name]
    except (OSError, ValueError, KeyError, TypeError):
        raise CdmError(f"{path}: damaged: run the stage `distill` again") from None
    return marker
