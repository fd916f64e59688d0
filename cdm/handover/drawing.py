"""Single pictures of a student: what `cdm sample` draws, and how a seed becomes a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cdm.data.sampling import to_bytes, unshifted_sigmas
from cdm.families import Conditioning
from cdm.models.student import Model, find_student
from cdm.randomness import picture_noise
from cdm.system.device import DTYPES, choose_device
from cdm.system.progress import track

Precision = Literal["fp32", "bf16", "fp16"]


def default_precision(device: torch.device) -> Precision:
    """float32 on a CPU, bfloat16 on an accelerator, whose memory real models fill."""
    return "fp32" if device.type == "cpu" else "bf16"


def draw_pictures(
    student: str | Path,
    prompts: Sequence[str],
    steps: int = 4,
    seed: int = 0,
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> Tensor:
    """Draws pictures of `prompts` with a student, without guidance: uint8 (len(prompts), 3, height, width).

    Picture i is that of the seed `seed + i`, and depends on nothing else in the call: each is drawn by itself. The
    text encoders leave before the transformer comes, so that they are never in memory together. `dtype` is a
    `Precision`, or auto. Raises CdmError.
    """
    model, place = find_student(Path(student)), choose_device(device)
    precision = default_precision(place) if dtype == "auto" else dtype
    conditionings = _encode(model, prompts, place, DTYPES[precision])
    pipeline = model.load(text=False, dtype=DTYPES[precision]).to(place)
    shape = model.latent_shape()
    pictures = []
    for offset, conditioning in enumerate(track(conditionings, "draw", unit="picture")):
        latents = model.family.sample(
            pipeline,
            picture_noise(seed + offset, shape).to(place, DTYPES[precision]),
            conditioning,
            conditioning,  # in the empty prompt's place: unused without guidance
            unshifted_sigmas(steps),
            guidance_scale=1.0,
        )
        pictures.append(to_bytes(model.family.decode(pipeline, latents)).cpu())
    return torch.cat(pictures)


def enlarge(image: Tensor, factor: int) -> Tensor:
    """A picture (3, height, width) in which each pixel has become a square of `factor` times `factor`."""
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _encode(
    model: Model, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Conditioning]:
    """The conditioning of each prompt, a row each."""
    encoders = model.family.load_pipeline(model.base, image=False, transformer=False, dtype=dtype).to(device)
    length = model.origin.max_sequence_length if model.origin else None

    def each() -> Iterator[Conditioning]:
        for prompt in track(prompts, "encode", unit="prompt"):
            yield model.family.encode(encoders, [prompt], length)

    return list(each())
