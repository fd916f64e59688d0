"""Single pictures of a model: how a seed becomes a picture, and what `cdm sample` draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cdm.data.sampling import to_bytes, unshifted_sigmas
from cdm.families import Conditioning
from cdm.families.common import check_finite
from cdm.models.student import Model, find_student
from cdm.randomness import picture_noise
from cdm.system.device import DTYPES, choose_device
from cdm.system.progress import track

Precision = Literal["fp32", "bf16", "fp16"]


def default_precision(device: torch.device) -> Precision:
    """float32 on a CPU, bfloat16 on an accelerator, whose memory real models fill."""
    return "fp32" if device.type == "cpu" else "bf16"


def chosen_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a `Precision`, or of the default one for `auto`."""
    return DTYPES[default_precision(device) if precision == "auto" else precision]


@dataclass(frozen=True)
class Drawer:
    """A model in memory that draws one picture after the other."""

    model: Model
    pipeline: Any
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, model: Model, device: torch.device, dtype: torch.dtype, *, text: bool = True) -> Drawer:
        """`text=False` leaves the text encoders out: it then draws what another has encoded. Raises CdmError."""
        return cls(model, model.load(text=text, dtype=dtype).to(device), device, dtype)

    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of a prompt, one row."""
        return _encode(self.model, self.pipeline, prompt)

    def draw(
        self,
        conditioning: Conditioning,
        steps: int,
        seed: int,
        *,
        guidance_scale: float = 1.0,
        empty: Conditioning | None = None,
    ) -> Tensor:
        """The picture of a seed, uint8 (3, height, width), on the CPU.

        `empty` is the conditioning of the empty prompt, needed where `guidance_scale` is not 1.
        """
        noise = picture_noise(seed, self.model.latent_shape()).to(self.device, self.dtype)
        latents = self.model.family.sample(
            self.pipeline,
            noise,
            conditioning,
            conditioning if empty is None else empty,
            unshifted_sigmas(steps),
            guidance_scale,
        )
        picture = self.model.family.decode(self.pipeline, latents)
        check_finite({"latents": latents, "pictures": picture}, self.pipeline, self.model.place, "--dtype")
        return to_bytes(picture).cpu()[0]


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
    precision = chosen_dtype(dtype, place)
    conditionings = _encode_all(model, prompts, place, precision)
    drawer = Drawer.load(model, place, precision, text=False)
    pictures = [
        drawer.draw(conditioning, steps, seed + offset)
        for offset, conditioning in enumerate(track(conditionings, "draw", unit="picture"))
    ]
    return torch.stack(pictures)


def enlarge(image: Tensor, factor: int) -> Tensor:
    """A picture (3, height, width) in which each pixel has become a square of `factor` times `factor`."""
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _encode(model: Model, pipeline: Any, prompt: str) -> Conditioning:
    length = model.origin.max_sequence_length if model.origin else None
    conditioning = model.family.encode(pipeline, [prompt], length)
    check_finite(conditioning, pipeline, model.base, "--dtype")
    return conditioning


def _encode_all(
    model: Model, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Conditioning]:
    """The conditioning of each prompt, a row each."""
    encoders = model.family.load_pipeline(model.base, image=False, transformer=False, dtype=dtype).to(device)

    def each() -> Iterator[Conditioning]:
        for prompt in track(prompts, "encode", unit="prompt"):
            yield _encode(model, encoders, prompt)

    return list(each())
