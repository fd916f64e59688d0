"""The sample sets that are compared: one a model and number of steps, all of the same prompts and noise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.params import Latents, Sample
from cdm.system.files import digest_of, sha256

MEMORY = 2**30
"""Bytes that the work on pictures may take at once, beside those of what works."""
WORK = 128
"""Bytes that features of a picture take, for each of its own while they are computed: the judge's first layers have
eight times its channels, in float32, several times over."""
BATCH = 256
"""The most pictures that are read at once."""


def parts(count: int, shape: Sequence[int], most: int = BATCH, work: int = WORK) -> Iterator[range]:
    """`count` pictures of a shape (3, height, width), in order: as many at once as fit into `MEMORY`, at most `most`.

    `work` are the bytes that each byte of them takes meanwhile.
    """
    size = max(1, min(most, MEMORY // (work * math.prod(shape))))
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


@dataclass(frozen=True)
class SampleSet:
    """Pictures of one model at one number of steps; picture k shows prompt `k // per_prompt`."""

    model: str
    """student or teacher."""
    steps: int
    evaluations: int
    """Of the transformer for one picture; a guided step costs two."""
    store: Store

    @property
    def key(self) -> str:
        return f"steps{self.steps}"

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """uint8 (len(indices), 3, height, width)."""
        return self.store.rows(indices)["images"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture: (3, height, width)."""
        return tuple(self.pictures([0]).shape[1:])

    def batches(self, most: int = BATCH, work: int = WORK) -> Iterator[Tensor]:
        """All pictures in order, cut by `parts`."""
        for part in parts(len(self.store), self.shape, most, work):
            yield self.pictures(part)


@dataclass(frozen=True)
class Samples:
    """Every set of an evaluation: of the same prompts, drawn from the same noise."""

    student: list[SampleSet]
    teacher: list[SampleSet]
    full: SampleSet
    """The teacher at its full number of steps: one of `teacher`, or a set that is compared with and not measured."""
    texts: list[str]
    per_prompt: int
    prompts_sha256: str
    student_sha256: str
    """Of the files of the student (`student_hashes`)."""

    @property
    def guided(self) -> bool:
        """Whether the teacher's steps cost two evaluations each."""
        return self.full.evaluations > self.full.steps

    @property
    def sets(self) -> list[SampleSet]:
        return [*self.student, *self.teacher]

    @property
    def needed(self) -> list[SampleSet]:
        """The sets that are measured, and `full`, which they are compared with."""
        return self.sets if self.full in self.sets else [*self.sets, self.full]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of the student that drew them, and of the samples themselves.

        Neither is read for it: the stage `sample` has written the student's hash into the manifest of each set, and a
        manifest has the hash of every shard.
        """
        manifests = {f"{each.model}/{each.key}": sha256(each.store.folder / MANIFEST) for each in self.sets}
        return {"student": self.student_sha256, "samples": digest_of(manifests)}


def open_samples(sample: Sample, latents: Latents, folder: Path, texts: Sequence[str]) -> Samples:
    """The sets that `sample` asks for, and the full-length one of `latents`, below `folder`, in order of their steps.

    `texts` are the evaluation prompts. Raises CdmError where a set is missing, holds another number of pictures than
    they ask for, or was drawn for other prompts or by another student than the rest.
    """
    student = [_open(folder, "student", steps) for steps in sorted(sample.steps)]
    teacher_steps = {*sample.teacher_steps, latents.steps}
    teacher = [_open(folder, "teacher", steps) for steps in sorted(teacher_steps)]
    full = next(pictures for pictures in teacher if pictures.steps == latents.steps)
    expected = len(texts) * latents.per_prompt
    prompts = {pictures.store.fact("prompts_sha256", str) for pictures in (*student, *teacher)}
    students = {pictures.store.fact("model", str) for pictures in student}
    for pictures in (*student, *teacher):
        if len(pictures.store) != expected:
            raise CdmError(
                f"{folder}/{pictures.model}/{pictures.key} holds {len(pictures.store)} pictures, but"
                f" {len(texts)} prompts of {latents.per_prompt} samples make {expected}: run the stage `sample` again"
            )
    for differing, what in ((prompts, "for different prompts"), (students, "by different students")):
        if len(differing) > 1:
            raise CdmError(f"the sample sets in {folder} were drawn {what}: run the stage `sample` again")
    return Samples(student, teacher, full, list(texts), latents.per_prompt, prompts.pop(), students.pop())


def _open(folder: Path, model: str, steps: int) -> SampleSet:
    store = Store(folder / model / f"steps{steps}")
    found = SampleSet(model, steps, store.fact("evaluations", int), store)
    if store.fact("steps", int) != steps or found.evaluations not in (steps, 2 * steps):
        raise CdmError(f"{store.folder}: not the samples of {steps} steps: run the stage `sample` again")
    if "images" not in store.names:
        raise CdmError(f"{store.folder}: holds no pictures: run the stage `sample` again")
    return found


@dataclass(frozen=True)
class RealPictures:
    """Real pictures, and the evaluation prompt (its index) that each one shows."""

    images: Tensor
    """uint8 (m, 3, height, width): all pictures of a file, mapped, so that memory holds those alone that are read."""
    prompt: Tensor
    """int64 (n,)."""
    rows: Tensor | None = None
    """int64 (n,): which of `images` they are; None: all of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture: (3, height, width)."""
        return tuple(self.images.shape[1:])

    def batches(self, most: int = BATCH, work: int = WORK) -> Iterator[Tensor]:
        """The pictures in order, cut by `parts`."""
        for part in parts(len(self.prompt), self.shape, most, work):
            chosen = slice(part.start, part.stop)
            yield self.images[chosen if self.rows is None else self.rows[chosen]]


def read_real(path: Path, texts: Sequence[str]) -> RealPictures:
    """The real pictures of the prompts `texts` in a safetensors file.

    The file holds `images` (uint8, (n, 3, height, width)) and in its metadata `prompts`, a JSON list with the
    prompt of each picture. Pictures of other prompts are left aside; every prompt needs at least one, because
    otherwise the two sets would differ in what they show. Raises CdmError.
    """
    try:
        with safe_open(path, framework="pt") as file:
            prompts = json.loads(file.metadata()["prompts"])
            images = file.get_tensor("images")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CdmError(
            f"evaluate.real: {path} is not a safetensors file with `images` and the metadata `prompts`: {error}"
        ) from None
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
        raise CdmError(
            f"evaluate.real: {path} holds {len(prompts)} prompts and {images.dtype} images"
            f" {tuple(images.shape)}, expected one prompt for each of (n, 3, height, width) uint8"
        )
    index = {text: i for i, text in enumerate(texts)}
    missing = index.keys() - set(prompts)
    if missing:
        raise CdmError(
            f"evaluate.real: {path} has no picture of {len(missing)} of the {len(texts)} evaluation prompts"
            f" (one is {min(missing)!r}): add some, or set evaluate.real to null to compare with the teacher"
        )
    kept = torch.tensor([i for i, prompt in enumerate(prompts) if prompt in index])
    return RealPictures(images, torch.tensor([index[prompts[i]] for i in kept.tolist()]), kept)
