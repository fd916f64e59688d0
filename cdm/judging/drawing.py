"""Drawing the pictures of a cell: shard by shard, over all processes, resumed where it was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cdm.data.sampling import Table, to_bytes, write_png
from cdm.data.spread import spread
from cdm.data.store import Store, is_complete, shard_rows
from cdm.families import Conditioning
from cdm.families.common import check_finite
from cdm.judging.cells import Drawing
from cdm.models.student import Model
from cdm.params import Runtime
from cdm.randomness import sample_noise
from cdm.system.device import DTYPES
from cdm.system.processes import Processes, Rows
from cdm.system.provenance import code_digest
from cdm.system.writing import placed


def draw_cell(
    drawing: Drawing, model: Model, texts: Sequence[str], samples: Path, pictures: Path, runtime: Runtime
) -> bool:
    """Write the store `samples` of a cell's pictures, and PNGs of the first picture of some prompts to `pictures`.

    The store has `images` (uint8, (samples, 3, height, width)): sample k shows prompt `k // per_prompt` and starts from
    `sample_noise(seed, [k], latent_shape)`, so that all rows of models of one shape have the same noise. An interrupted
    run is resumed. False where the store was there already.
    """
    processes = Processes.join(runtime.device)
    drawn = not processes.agree(is_complete(samples, drawing.metadata))
    if drawn:
        height, width = (size * model.family.pixels_per_latent(model.base) for size in drawing.latent_shape[1:])
        table = Table(
            samples,
            len(texts) * drawing.per_prompt,
            shard_rows(3 * height * width),
            drawing.metadata,
            code_digest("sample", model.family.name),
        )

        @cache  # loaded when the first batch is drawn: after the folder has been looked at, if there is any batch
        def artist() -> _Artist:
            return _Artist.load(drawing, model, texts, processes.device, offload=runtime.offload_encoders)

        title = f"{drawing.row}, {drawing.set}"
        table.fill(processes, lambda rows: artist().draw(rows), runtime.batch_size, title)
    if processes.is_main:
        _write_pictures(Store(samples), drawing, texts, pictures)
    processes.wait()
    return drawn


@dataclass(frozen=True)
class _Artist:
    """A model in memory, with the text encoders of its own that read the prompts."""

    drawing: Drawing
    model: Model
    texts: Sequence[str]
    encoders: Any
    pipeline: Any
    empty: Conditioning
    device: torch.device
    offload: bool
    """Whether the text encoders wait in the CPU's memory while pictures are drawn."""

    @classmethod
    def load(
        cls, drawing: Drawing, model: Model, texts: Sequence[str], device: torch.device, *, offload: bool
    ) -> _Artist:
        dtype, family = DTYPES[drawing.precision], model.family
        encoders = family.load_pipeline(model.base, image=False, transformer=False, dtype=dtype).to(device)
        pipeline = model.load(text=False, dtype=dtype).to(device)
        empty = family.encode(encoders, [""], drawing.max_sequence_length)
        return cls(drawing, model, texts, encoders, pipeline, empty, device, offload)

    def draw(self, samples: range) -> Rows:
        """Pictures of these samples, uint8 on the CPU."""
        drawing, family = self.drawing, self.model.family
        noise = sample_noise(drawing.seed, samples, drawing.latent_shape)
        latents = family.sample(
            self.pipeline,
            noise.to(self.device, DTYPES[drawing.precision]),
            self._encode([k // drawing.per_prompt for k in samples]),
            self.empty,
            drawing.sigmas,
            drawing.guidance_scale,
        )
        images = family.decode(self.pipeline, latents)
        check_finite({"latents": latents, "pictures": images}, self.pipeline, self.model.place, "precision")
        return {"images": to_bytes(images).cpu()}

    def _encode(self, prompts: Sequence[int]) -> Conditioning:
        """The conditioning of each of these prompts; one that stands there several times is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        encoders = self.encoders.to(self.device) if self.offload else self.encoders
        texts = [self.texts[prompt] for prompt in distinct]
        encoded = self.model.family.encode(encoders, texts, self.drawing.max_sequence_length)
        check_finite(encoded, encoders, self.model.base, "precision")
        if self.offload:
            self.encoders.to("cpu")
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: tensor[rows] for name, tensor in encoded.items()}


def _write_pictures(store: Store, drawing: Drawing, texts: Sequence[str], folder: Path) -> None:
    """The first picture of each of some prompts, spread over the list, as PNGs named by the prompt's number."""
    with placed(folder) as staged:
        staged.mkdir(parents=True)
        for prompt in spread(len(texts), drawing.pictures):
            sample = prompt * drawing.per_prompt
            image = store.rows([sample])["images"][0]
            facts = {"steps": drawing.steps, "seed": drawing.seed, "sample": sample}
            write_png(staged / f"{prompt:06d}.png", image, prompt=texts[prompt], **facts)
