"""Sampling: the teacher's full-length latents, the pairs of a regression, and the sample sets that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm.data.prompt_set import PromptSet
from cdm.data.reference import Reference
from cdm.data.spread import spread
from cdm.data.store import ShardWriter, Store, is_complete, make_empty, open_staging, publish, shard_rows
from cdm.families import Conditioning, Family, get_family
from cdm.families.common import check_finite
from cdm.flow import inference_sigmas
from cdm.models.manifest import TeacherManifest
from cdm.models.student import Model, find_student, student_hashes
from cdm.params import Latents, Runtime, Sample
from cdm.randomness import Draws, prompt_indices, sample_noise
from cdm.system.device import DTYPES
from cdm.system.files import digest_of
from cdm.system.problems import naming
from cdm.system.processes import Processes, Rows
from cdm.system.progress import track
from cdm.system.provenance import code_digest

FLOAT_BYTES = 4


def evaluations(steps: int, guidance_scale: float) -> int:
    """Number of function evaluations (NFE) for one sample: a step with classifier-free guidance costs two."""
    return steps if guidance_scale == 1 else 2 * steps


def unshifted_sigmas(steps: int) -> list[float]:
    """Levels of the evaluations before the model's own shift: 1, 1 - 1/n, ..., 1/n."""
    return inference_sigmas(steps, shift=1.0).tolist()


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8."""
    return (images * 255).round().to(torch.uint8)


def tile(images: Tensor) -> Tensor:
    """Pictures (n, 3, height, width), uint8, as one (3, ...) of about as many columns as rows; gaps are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    gaps = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
    cells = torch.cat([images, gaps]).unflatten(0, (rows, columns))  # (rows, columns, 3, height, width)
    return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def write_png(path: Path, image: Tensor, **text: str | int | float) -> None:
    """A picture (3, height, width), uint8, as a PNG with `text` as its metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(path, "PNG", pnginfo=info)


@dataclass(frozen=True)
class Sampler:
    """One model with the prompts that it draws."""

    family: Family
    pipeline: Any
    source: Path
    """Where the model lies."""
    prompts: PromptSet
    empty: Conditioning
    guidance_scale: float
    device: torch.device
    precision: str

    def draw(self, noise: Tensor, prompts: Sequence[int], steps: int) -> Tensor:
        """Latents of the `prompts` from their `noise`, on the CPU."""
        conditioning = self.prompts.conditioning(prompts, self.device)
        dtype = DTYPES[self.precision]
        drawn = self.family.sample(
            self.pipeline,
            noise.to(self.device, dtype),
            _in_dtype(dtype, conditioning),
            _in_dtype(dtype, self.empty),
            unshifted_sigmas(steps),
            self.guidance_scale,
        )
        latents = drawn.float().cpu()
        check_finite({"latents": latents}, self.pipeline, self.source, "latents.precision")
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of `latents` as uint8, on the CPU."""
        pictures = self.family.decode(self.pipeline, latents.to(self.device))
        check_finite({"pictures": pictures}, self.pipeline, self.source, "latents.precision")
        return to_bytes(pictures).cpu()


def _in_dtype(dtype: torch.dtype, conditioning: Conditioning) -> Conditioning:
    """The conditioning with its numbers in `dtype`; masks stay."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in conditioning.items()
    }


def _sampler(
    device: torch.device,
    model: Model,
    prompts: Path,
    *,
    guidance_scale: float,
    precision: str,
    image: bool,
    subset: str = "eval",
) -> Sampler:
    return Sampler(
        model.family,
        model.load(text=False, image=image, dtype=DTYPES[precision]).to(device),
        model.place,
        PromptSet(prompts / subset),
        PromptSet(prompts / "empty").conditioning([0], device),
        guidance_scale,
        device,
        precision,
    )


def _batches(start: int, stop: int, size: int, shard: int) -> list[range]:
    """Batches of up to `size` samples that begin anew at every shard: a run resumed at `start` has the same ones."""
    ends = [min(first + shard, stop) for first in range(start, stop, shard)]
    return [
        range(first, min(first + size, end))
        for begin, end in zip(range(start, stop, shard), ends, strict=True)
        for first in range(begin, end, size)
    ]


@dataclass(frozen=True)
class Table:
    """A store that several processes fill: all draw, the main one writes. A row is a sample."""

    folder: Path
    rows: int
    rows_per_shard: int
    metadata: dict[str, Any]
    fingerprint: str = ""

    def fill(self, processes: Processes, draw: Callable[[range], Rows], batch_size: int, title: str) -> None:
        """Writes the rows that `draw` returns for each batch; what an interrupted run has written is kept."""
        with naming(self.folder), ExitStack() as stack:
            writer = None
            if processes.is_main:
                written = ShardWriter(self.folder, self.rows_per_shard, self.metadata, self.fingerprint)
                writer = stack.enter_context(written)
            done = processes.agree(writer.rows_done if writer else 0)
            batches = _batches(done, self.rows, batch_size, self.rows_per_shard)
            drawn = processes.draw(batches, draw)
            for rows in track(drawn, title, total=len(batches), unit="batch"):
                if writer:
                    writer.append(rows)
        processes.wait()


def cache_teacher_latents(
    settings: Latents,
    teacher: TeacherManifest,
    prompts: Path,
    out: Path,
    *,
    seed: int,
    guidance_scale: float,
    runtime: Runtime,
) -> None:
    """Write the store `out` of the teacher's full-length samples of the evaluation prompts.

    Its tensors: `noise` and `latents` (float32, (samples, *latent_shape)) and `prompt` (int64): sample k belongs
    to prompt `k // per_prompt` and starts from `sample_noise(seed, [k], latent_shape)`. An interrupted run is
    resumed.
    """
    per_prompt = settings.per_prompt

    def noise(samples: range) -> Tensor:
        return sample_noise(seed, samples, teacher.latent_shape)

    prompt_of_sample = [k // per_prompt for k in range(len(PromptSet(prompts / "eval")) * per_prompt)]
    _cache(
        settings,
        teacher,
        prompts,
        out,
        "eval",
        prompt_of_sample,
        noise,
        {"per_prompt": per_prompt},
        seed=seed,
        guidance_scale=guidance_scale,
        runtime=runtime,
    )


def cache_training_pairs(
    settings: Latents,
    teacher: TeacherManifest,
    prompts: Path,
    out: Path,
    *,
    seed: int,
    guidance_scale: float,
    runtime: Runtime,
) -> None:
    """Write the store `out` of `latents.train_pairs` teacher's samples of training prompts, which are shuffled.

    Tensors as in `cache_teacher_latents`, with other noise. Where there are none, `out` is an empty folder. Raises
    CdmError if it holds anything but a store.
    """
    count = settings.train_pairs
    if not count:
        make_empty(out)
        return

    def noise(samples: range) -> Tensor:
        return Draws(seed, 0, samples).normal("pairs", teacher.latent_shape)

    prompt_of_sample = prompt_indices(seed, range(count), len(PromptSet(prompts / "train")))
    _cache(
        settings,
        teacher,
        prompts,
        out,
        "train",
        prompt_of_sample,
        noise,
        {},
        seed=seed,
        guidance_scale=guidance_scale,
        runtime=runtime,
    )


def _cache(
    settings: Latents,
    teacher: TeacherManifest,
    prompts: Path,
    out: Path,
    subset: str,
    prompt_of_sample: Sequence[int],
    noise: Callable[[range], Tensor],
    metadata: dict[str, Any],
    *,
    seed: int,
    guidance_scale: float,
    runtime: Runtime,
) -> None:
    """A store of the teacher's samples: of prompt `prompt_of_sample[k]` of the set `subset`, from row k of `noise`."""
    family = get_family(teacher.family)
    metadata = {
        "steps": settings.steps,
        "evaluations": evaluations(settings.steps, guidance_scale),
        "guidance_scale": guidance_scale,
        **metadata,
        "precision": settings.precision,
        "prompts_sha256": PromptSet(prompts / subset).sha256,
        "seed": seed,
        "teacher": teacher.digest,
    }
    processes = Processes.join(runtime.device)

    @cache  # loaded when the first batch is drawn: after the folder has been looked at, if there is any batch
    def sampler() -> Sampler:
        model = Model(family, teacher.folder())
        return _sampler(
            processes.device,
            model,
            prompts,
            guidance_scale=guidance_scale,
            precision=settings.precision,
            image=False,
            subset=subset,
        )

    def draw(samples: range) -> Rows:
        start, prompt = noise(samples), [prompt_of_sample[k] for k in samples]
        latents = sampler().draw(start, prompt, settings.steps)
        return {"noise": start, "latents": latents, "prompt": torch.tensor(prompt)}

    rows_per_shard = shard_rows(2 * FLOAT_BYTES * torch.Size(teacher.latent_shape).numel())
    table = Table(out, len(prompt_of_sample), rows_per_shard, metadata, code_digest("latents", family.name))
    table.fill(processes, draw, runtime.batch_size, out.name)


def draw_samples(
    settings: Sample,
    teacher: TeacherManifest,
    student: Path,
    prompts: Path,
    latents: Path,
    out: Path,
    *,
    runtime: Runtime,
) -> None:
    """Write the sample sets that are compared: `out/student/steps{N}`, `out/teacher/steps{N}`, `out/pictures`.

    Each set is a store of `latents` (float32) and `images` (uint8, (samples, 3, height, width)), drawn from the
    noise of the cache `latents`, which also gives the teacher's full-length set. The student draws without
    guidance. An interrupted run is resumed. Raises CdmError before drawing if the student is missing or the
    cache belongs to another teacher or other prompts.
    """
    reference, family = Reference.open(prompts, latents, teacher), get_family(teacher.family)
    learnt = find_student(student, teacher)
    contestants = (
        Contestant("student", learnt, digest_of(student_hashes(student)), 1.0, {*settings.steps}),
        Contestant(
            "teacher",
            Model(family, teacher.folder()),
            teacher.digest,
            reference.guidance_scale,
            {*settings.teacher_steps, reference.steps},
        ),
    )
    processes = Processes.join(runtime.device)
    staging = out
    if processes.is_main:
        staging = open_staging(
            out, "student", digest_of([code_digest("sample", family.name), settings.model_dump()])
        )
    for contestant in contestants:
        _write_sets(contestant, processes, reference, prompts, staging, settings.pictures, runtime.batch_size)
    if processes.is_main:
        publish(out)
    processes.wait()


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison."""

    name: str
    model: Model
    digest: str
    guidance_scale: float
    steps: set[int]


def _write_sets(
    contestant: Contestant,
    processes: Processes,
    reference: Reference,
    prompts: Path,
    staging: Path,
    pictures: int,
    batch_size: int,
) -> None:
    """All sample sets of a model, with their pictures. The guided full-length set is the cache's own."""
    scale, name = contestant.guidance_scale, contestant.name
    sampler = _sampler(
        processes.device,
        contestant.model,
        prompts,
        guidance_scale=scale,
        precision=reference.precision,
        image=True,
    )
    for steps in sorted(contestant.steps):
        drawn = name == "teacher" and steps == reference.steps
        folder = staging / name / f"steps{steps}"
        _write_set(sampler, processes, reference, folder, steps, contestant.digest, batch_size, drawn=drawn)
        if processes.is_main:
            texts, title = sampler.prompts.texts, f"{name}-steps{steps}"
            _write_pictures(Store(folder), texts, pictures, staging / "pictures", title)


def _write_set(
    sampler: Sampler,
    processes: Processes,
    reference: Reference,
    folder: Path,
    steps: int,
    digest: str,
    batch_size: int,
    *,
    drawn: bool,
) -> None:
    """One sample set, unless an interrupted run has finished it; `drawn`: its latents are the cache's."""
    metadata = {
        "steps": steps,
        "evaluations": evaluations(steps, sampler.guidance_scale),
        "guidance_scale": sampler.guidance_scale,
        "per_prompt": reference.per_prompt,
        "precision": sampler.precision,
        "prompts_sha256": sampler.prompts.sha256,
        "seed": reference.seed,
        "model": digest,
    }
    if processes.agree(is_complete(folder, metadata)):
        return

    def draw(samples: range) -> Rows:
        row = reference.cache.rows(samples)
        latents = row["latents"] if drawn else sampler.draw(row["noise"], row["prompt"].tolist(), steps)
        return {"latents": latents, "images": sampler.decode(latents)}

    table = Table(folder, len(reference.cache), _rows_per_shard(reference.cache), metadata)
    table.fill(processes, draw, batch_size, "/".join(folder.parts[-2:]))


def _rows_per_shard(cache: Store) -> int:
    """Rows of a shard of a sample set: as in the latents cache."""
    return shard_rows(sum(tensor.nbytes for tensor in cache.rows([0]).values()))


def _write_pictures(store: Store, texts: Sequence[str], count: int, folder: Path, name: str) -> None:
    """The first sample of each of `count` prompts, spread over the list `texts`, as a PNG of its own."""
    for prompt in spread(len(texts), count):
        image = store.rows([prompt * store.fact("per_prompt", int)])["images"][0]
        steps, seed = store.fact("steps", int), store.fact("seed", int)
        write_png(folder / f"{prompt:03d}-{name}.png", image, prompt=texts[prompt], steps=steps, seed=seed)
