"""Finding the models that are judged: whatever `cdm sample` takes, and any diffusers folder or hub id of a known
family."""

from __future__ import annotations

from cdm.errors import CdmError
from cdm.families import family_of_pipeline
from cdm.families.configs import INDEX
from cdm.families.folder import WEIGHTS
from cdm.judging.design import JudgedModel
from cdm.models.hub import is_hub_id, resolve
from cdm.models.manifest import file_hashes, pipeline_class
from cdm.models.parts import check_parts, read_headers
from cdm.models.student import FULL, Model, find_student
from cdm.models.use import Use, check_use
from cdm.system.files import Memory, at_home, digest_of


def is_missing(judged: JudgedModel) -> bool:
    """Whether the source is neither a folder or file here nor a hub id."""
    source = str(judged.source)
    return not at_home(source).exists() and not is_hub_id(source)


def find(judged: JudgedModel) -> Model:
    """The model on this machine; one of a hub is downloaded once. Raises CdmError."""
    source = str(judged.source)
    place = at_home(source)
    if place.exists():
        if judged.revision is not None:
            raise CdmError(
                f"revision is {judged.revision!r}, but {source} is here and has none: set it to null"
            )
        return find_student(place)
    try:
        folder = resolve(source, judged.revision)
    except CdmError as error:
        raise CdmError(str(error).replace("teacher.", "")) from None
    return Model(family_of_pipeline(pipeline_class(folder)), folder)


def check(judged: JudgedModel, model: Model) -> None:
    """Raises CdmError if the diffusers folder of a model is not whole, not what its configs say, or does not draw or
    read what is asked of it."""
    check_parts(model.base, model.family, read_headers(model.base))
    try:
        check_use(model.family, model.base, judged.resolution, Use(text_tokens(judged, model)))
    except CdmError as error:
        raise CdmError(str(error).replace("teacher.", "").replace("prompts.", "")) from None


def digest(model: Model, memory: Memory) -> str:
    """Hash of all that a model draws with, wherever it lies."""
    found = dict(file_hashes(model.base, memory.sha256))
    own = model.lora or model.weights
    if model.lora is not None:
        files = [path for path in model.lora.iterdir() if path.suffix in (".json", WEIGHTS)]
        found |= {f"lora/{path.name}": memory.sha256(path) for path in sorted(files)}
    if model.weights is not None:
        found |= {"weights": memory.sha256(model.weights)}
    record = model.base / FULL
    if own is None and record.is_file() and (model.base / INDEX).is_file():
        found |= {FULL: memory.sha256(record)}
    return digest_of([model.family.name, found])


def latent_shape(judged: JudgedModel, model: Model) -> tuple[int, ...]:
    """Shape of a sample at the resolution that is asked for, which `check` has seen."""
    if judged.resolution is None:
        return model.latent_shape()
    return model.family.latent_shape(model.base, judged.resolution)


def text_tokens(judged: JudgedModel, model: Model) -> int | None:
    """Text tokens of a prompt: those asked for, or those it was trained with; None is its family's default."""
    if judged.max_sequence_length is not None:
        return judged.max_sequence_length
    return model.origin.max_sequence_length if model.origin is not None else None
