"""A student on this disk: a whole pipeline, a LoRA, or a file of weights, with the record of what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cdm import limits
from cdm.errors import CdmError
from cdm.families import Family, family_of_pipeline, get_family
from cdm.families.configs import INDEX
from cdm.families.folder import WEIGHTS
from cdm.models.hub import resolve
from cdm.models.manifest import TeacherManifest, file_hashes, pipeline_class
from cdm.params import Params, Text
from cdm.system.files import at_home, sha256, write_json
from cdm.system.records import parse_record

LORA = "lora.json"
"""The record in the folder of a LoRA; that it is there says that the folder is one."""
FULL = "student.json"
"""The record in the diffusers folder of a student of its own weights."""
METADATA = "cdm"
"""The record in the header of a single file."""
SHAPING: dict[str, bool | set[str]] = {
    "seed": True,
    "prompts": {"max_sequence_length"},
    "schedule": True,
    "distill": True,
}
"""Parameters that shape a student, and that mean something on another machine."""


@dataclass(frozen=True)
class Origin:
    """The record of how a student was made: its teacher and the parameters."""

    family: Text
    source: Text
    """The teacher: a folder or a hub id, as `teacher.source` names it."""
    revision: Text | None
    digest: str
    """Of the teacher (`TeacherManifest.digest`)."""
    latent_shape: list[Annotated[int, Field(ge=1, le=limits.PIXELS)]] = field(default_factory=list)
    """Of a sample that it was trained on; empty where it is not known."""
    params: dict[str, Any] = field(default_factory=dict)
    """The parameters of the distillation, by section."""
    training: Annotated[str, Field(pattern=r"^[\w-]*$")] = ""
    """Name of the training, which is that of the folder of its checkpoints; empty where it is not known."""

    @classmethod
    def from_training(
        cls, teacher: TeacherManifest, params: Params | None = None, training: str = ""
    ) -> Origin:
        """The record of a student of `teacher`, made by the training of that name."""
        values = params.model_dump(mode="json", include=SHAPING) if params else {}
        shape = list(teacher.latent_shape)
        return cls(teacher.family, teacher.source, teacher.revision, teacher.digest, shape, values, training)

    @classmethod
    def read(cls, text: str | bytes, where: Path) -> Origin:
        """The record in `text`; raises CdmError, naming `where`, if it is none."""
        try:
            record = parse_record(cls, text)
        except ValueError:
            record = None
        if record is None or not record.is_sound:
            raise CdmError(f"{where}: damaged: run the stage `distill` again")
        return record

    def write(self, path: Path) -> None:
        """As a file."""
        write_json(path, asdict(self))

    def as_text(self) -> str:
        """As one line."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def is_sound(self) -> bool:
        """Whether the shape is one of latents, and the parameters are such as a training has."""
        sections = [self.params.get(name, {}) for name in ("prompts", "schedule", "distill")]
        if len(self.latent_shape) not in (0, 3) or not all(isinstance(each, dict) for each in sections):
            return False
        numbers = (sections[0].get("max_sequence_length", 0), sections[2].get("iterations", 0))
        return all(type(each) is int and each >= 0 for each in numbers) and numbers[0] <= limits.TOKENS

    @property
    def max_sequence_length(self) -> int | None:
        """Text tokens that the student was trained with, if that is known."""
        length: int | None = self.params.get("prompts", {}).get("max_sequence_length")
        return length


@dataclass(frozen=True)
class Model:
    """A model to sample from: the diffusers folder `base`, with a LoRA or a transformer's weights if there are any."""

    family: Family
    base: Path
    lora: Path | None = None
    """Folder of a LoRA for `base`."""
    weights: Path | None = None
    """Safetensors file of a transformer that takes the place of that of `base`."""
    origin: Origin | None = None

    def load(self, **options: Any) -> Any:
        """The pipeline, by `Family.load_pipeline` with these options. Raises CdmError."""
        pipeline = self.family.load_pipeline(self.base, **options)
        if self.lora is not None:
            self.family.load_lora(pipeline, self.lora)
        if self.weights is not None:
            _load_weights(pipeline.transformer, self.weights)
        return pipeline

    @property
    def place(self) -> Path:
        """Where what it draws with lies."""
        return self.lora or self.weights or self.base

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a sample: as it was trained, or where that is not known as the folder's configs have it."""
        if self.origin is not None and self.origin.latent_shape:
            return tuple(self.origin.latent_shape)
        return self.family.latent_shape(self.base)


def find_student(path: Path, teacher: TeacherManifest | None = None) -> Model:
    """The student at `path`, a folder or a single file; of this `teacher`, if given.

    Raises CdmError if it is missing, of another family, or one that needs a teacher which is another or not there.
    """
    path = at_home(path)
    if path.suffix == ".safetensors" and path.is_file():
        model = _with_teacher(path, _header(path), teacher, weights=path)
    elif not path.is_dir():
        raise CdmError(
            f"{path}: no student there: run `dvc repro` (or the stage `distill`), or name its folder"
        )
    elif (path / LORA).exists():
        model = _with_teacher(path, _record(path / LORA), teacher, lora=path)
    else:
        origin = _record(path / FULL) if (path / FULL).exists() else None
        model = Model(family_of_pipeline(pipeline_class(path)), path, origin=origin)
    if teacher is not None and model.family.name != teacher.family:
        raise CdmError(
            f"{path}: a student of the family {model.family.name}, but the teacher is {teacher.family}"
        )
    return model


def student_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the files that a student is loaded from, and of its record, by path in its folder.

    `path` is a folder or a single file, as `find_student` takes it.
    """
    if path.is_file():
        return {path.name: sha256(path)}
    if (path / INDEX).is_file():
        record = {FULL: sha256(path / FULL)} if (path / FULL).is_file() else {}
        return dict(sorted((file_hashes(path) | record).items()))
    of_lora = sorted(each for each in path.iterdir() if each.suffix in (".json", WEIGHTS))
    return {each.name: sha256(each) for each in of_lora}


def _with_teacher(path: Path, origin: Origin, teacher: TeacherManifest | None, **parts: Path) -> Model:
    """A student that needs its teacher's other parts."""
    family, kind = get_family(origin.family), "a LoRA" if "lora" in parts else "a transformer"
    if teacher is not None:
        if origin.family == teacher.family and origin.digest != teacher.digest:
            raise CdmError(f"{path}: {kind} for another teacher: run the stage `distill` again")
        return Model(family, teacher.folder(), origin=origin, **parts)
    try:
        return Model(family, resolve(origin.source, origin.revision), origin=origin, **parts)
    except CdmError as error:
        raise CdmError(f"{path}: {kind} for {origin.source}, which is not to be had: {error}") from None


def _record(path: Path) -> Origin:
    try:
        return Origin.read(path.read_bytes(), path)
    except OSError as error:
        raise CdmError(f"{path}: cannot be read: {error.strerror}") from None


def _header(path: Path) -> Origin:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CdmError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None
    if METADATA not in metadata and any(name.startswith("diffusion_model.") for name in names):
        raise CdmError(f"{path}: a LoRA for ComfyUI: give its student, or an export of the format lora")
    if METADATA not in metadata:
        raise CdmError(f"{path}: does not say which teacher it needs: only files of `cdm export` do")
    return Origin.read(metadata[METADATA], path)


def _load_weights(transformer: Any, path: Path) -> None:
    try:
        transformer.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CdmError(f"{path}: not of the teacher's transformer: {' '.join(str(error).split())}") from None
