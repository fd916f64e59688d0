"""The record of the teacher: which model is distilled, with hashes of its files and the facts that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.families.configs import INDEX, read_config
from cdm.families.folder import WEIGHTS, pipeline_files
from cdm.models.hub import downloaded, resolve, resolved_revision
from cdm.models.parts import check_parts, read_headers
from cdm.models.use import Use, check_use
from cdm.params import Text
from cdm.system.files import Memory, at_home, digest_of, sha256, write_json
from cdm.system.progress import track
from cdm.system.provenance import code_digest
from cdm.system.records import parse_record


@dataclass(frozen=True)
class TeacherManifest:
    """The record of the model that is distilled: the content of data/teacher.json."""

    family: Text
    source: Text
    revision: str | None
    """The commit that a hub model was found at; null for a folder."""
    files: dict[str, str]
    """SHA-256 of every file that the model is loaded from, by path."""
    latent_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    shift: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    parameters: int
    """Of the transformer."""

    @property
    def digest(self) -> str:
        """Hash of what the model is and of the size at which it draws, wherever it lies."""
        return digest_of([self.family, self.files, self.latent_shape])

    def folder(self) -> Path:
        """The local folder of the model; the hub is asked only for what its cache lacks. Raises CdmError as
        `resolve` does."""
        return self.downloaded() or resolve(self.source, self.revision)

    def downloaded(self) -> Path | None:
        """The folder of a hub model in the hub's cache, if that holds all its files at the recorded commit."""
        folder = None if self.revision is None else downloaded(self.source, self.revision)
        whole = folder is not None and all((folder / name).is_file() for name in self.files)
        return folder if whole else None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TeacherManifest:
        """The manifest at `path`; raises CdmError if the stage `teacher` has not written one there."""
        try:
            return parse_record(cls, path.read_bytes())
        except (OSError, ValueError):
            raise CdmError(f"{path}: missing or damaged: run the stage `teacher`") from None


def describe(
    family: str,
    source: str,
    revision: str | None,
    resolution: int | None = None,
    recorded: TeacherManifest | None = None,
    memory: Memory | None = None,
    use: Use | None = None,
) -> TeacherManifest:
    """Find the model, check that it is of the family, whole, draws at `resolution` (pixels; None is its own) and does
    what else is asked of it, and hash its files. Raises CdmError.

    A hub model without a `revision` stays at the commit of `recorded`, an earlier manifest of the same source, as
    long as the hub's cache has it. With the `memory` of an earlier run only what has changed is read.
    """
    memory = memory or Memory()
    folder = _pinned(source, revision, recorded) or resolve(source, revision)
    facts = _facts(family, source, folder, resolution, use or Use(), memory)
    return TeacherManifest(
        family=family,
        source=source,
        revision=resolved_revision(folder),
        latent_shape=facts["latent_shape"],
        shift=facts["shift"],
        parameters=facts["parameters"],
        files=file_hashes(folder, memory.sha256),
    )


def _pinned(source: str, revision: str | None, recorded: TeacherManifest | None) -> Path | None:
    """The folder of the commit at which `recorded` found a hub model, if it is what `source` and `revision` mean."""
    if recorded is None or source != recorded.source or at_home(source).exists():
        return None
    return recorded.downloaded() if revision in (None, recorded.revision) else None


def _facts(
    family: str, source: str, folder: Path, resolution: int | None, use: Use, memory: Memory
) -> dict[str, Any]:
    """Latent shape, shift and number of parameters of a model that has been checked, with its parts.

    All this follows from its small files and its autoencoder, from the headers of its weights, from the code and from
    the libraries: while these stay as they were, `memory` has the answer, and neither torch nor diffusers is imported.
    """
    headers = read_headers(folder)
    names = pipeline_files(folder).values()
    read = [name for name in names if not name.endswith(WEIGHTS) or name.startswith("vae/")]
    configs = {name: memory.sha256(folder / name) for name in read}
    code = [code_digest("teacher", family), version("transformers")]
    key = digest_of([family, resolution, asdict(use), configs, headers, code])
    known: dict[str, Any] = memory.values.get("teacher", {})
    if known.get("key") != key:
        model, found = get_family(family), pipeline_class(folder)
        if found != model.pipeline_class_name:
            raise CdmError(
                f"{source}: a {found}, but the family {family} needs a {model.pipeline_class_name}: check"
                " teacher.family"
            )
        check_parts(folder, model, headers)
        check_use(model, folder, resolution, use)
        known = memory.values["teacher"] = {
            "key": key,
            "latent_shape": list(model.latent_shape(folder, resolution)),
            "shift": model.shift(folder, resolution),
            "parameters": model.count_parameters(folder),
        }
    return known


def pipeline_class(folder: Path) -> str:
    """Name of the diffusers pipeline that a folder holds."""
    try:
        return str(read_config(folder, INDEX)["_class_name"])
    except (KeyError, TypeError):
        raise CdmError(f"{folder / INDEX}: does not name a diffusers pipeline") from None


def file_hashes(folder: Path, sha256: Callable[[Path], str] = sha256) -> dict[str, str]:
    """SHA-256 of the files that the pipeline in `folder` is loaded from, by path in it, sorted.

    Raises CdmError if they are not known, because an index of the folder is missing or damaged.
    """
    names = sorted(pipeline_files(folder).values())
    return {name: sha256(folder / name) for name in track(names, "hash", unit="file")}
