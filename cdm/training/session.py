"""A training that is run by hand, round by round: in a script or a notebook, without DVC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from cdm.data import prompts
from cdm.data.prompt_set import as_float32
from cdm.data.sampling import cache_training_pairs, to_bytes
from cdm.errors import CdmError
from cdm.families.common import check_finite
from cdm.flow import inference_sigmas
from cdm.models.manifest import describe
from cdm.params import Params
from cdm.preflight import check_paths
from cdm.randomness import picture_noise
from cdm.system import host
from cdm.system.device import DTYPES
from cdm.system.files import at_home
from cdm.system.processes import join
from cdm.training.distiller import Metrics
from cdm.training.identity import fingerprint
from cdm.training.inputs import Inputs
from cdm.training.probe import draw_student, exchanged
from cdm.training.saver import Saver
from cdm.training.saving import save_student, write_log
from cdm.training.setup import prepare

if TYPE_CHECKING:
    from PIL.Image import Image


class Distillation:
    """The distillation of a student, run round by round.

    `params` says of which teacher and how; `folder` takes what the training needs and makes: the encoded prompts, pairs
    where a term learns from them, and checkpoints. Where `folder` holds a checkpoint of the very same training, it goes
    on from there. The student is the one that the stage `distill` makes of the same parameters, to the byte.

    Raises CdmError if a file that `params` names is not there or cannot be used, or if `params` ask for a probe, which
    needs the teacher's samples of the pipeline: draw and measure by hand instead.
    """

    def __init__(self, params: Params, folder: str | Path) -> None:
        if params.distill.probe.reference != "none":
            raise CdmError(
                "distill.probe needs the pipeline's stage `latents`: set distill.probe.reference to none here"
            )
        check_paths(params)
        host.prepare(params.runtime.threads)
        self.params, self.folder = params, at_home(folder)
        named = params.teacher
        teacher = describe(named.family, named.source, named.revision, named.resolution)
        encoded, seed, runtime = self.folder / "prompts", params.seed, params.runtime
        prompts.build_missing(params.prompts, teacher, encoded, seed=seed, runtime=runtime)
        if params.latents.train_pairs:
            cache_training_pairs(
                params.latents,
                teacher,
                encoded,
                self.folder / "pairs",
                seed=seed,
                guidance_scale=named.guidance_scale,
                runtime=runtime,
            )
        self.inputs = Inputs.gather(params, teacher, encoded)
        timeout = timedelta(hours=params.runtime.timeout_hours)
        self.accelerator = Accelerator(cpu=join(params.runtime.device, timeout).device.type == "cpu")
        self.state, self.distiller = prepare(params, self.inputs, self.accelerator)
        checkpoints = self.folder / "checkpoints" / fingerprint(params, self.inputs)
        self._saver = Saver(checkpoints, self.accelerator, timeout)
        saved = self._saver.newest()
        if saved is not None:
            self.state.restore(saved)
        self._pipeline: Any = None

    @property
    def iteration(self) -> int:
        """Iterations that have been done."""
        return self.state.iteration

    @property
    def log(self) -> list[dict[str, float]]:
        """The figures of every round so far: losses, norms of gradients, learning rates."""
        return self.state.rows

    def __iter__(self) -> Iterator[Metrics]:
        """Runs the rounds that are left and gives the figures of each; stop whenever you like, and iterate again."""
        while self.iteration < self.params.distill.iterations:
            yield self.round()

    def round(self) -> Metrics:
        """Runs one round, `student_every` iterations, and returns its figures. Raises CdmError if it diverges."""
        iteration = self.iteration
        if iteration >= self.params.distill.iterations:
            raise CdmError(f"all {iteration} iterations are done: raise distill.iterations for more")
        self.state.after_round(self.distiller.round(iteration), iteration, self.params.distill)
        return self.state.rows[-1]

    @torch.no_grad()
    def draw(self, texts: str | Sequence[str], steps: int = 4, seed: int = 0) -> list[Image]:
        """Pictures of prompts by the moving average of the student, as it is now, without guidance.

        Picture i is that of the seed `seed + i`; `cdm sample` draws the same with the saved student, but for rounding.
        Raises CdmError if a text's embedding, or a picture, has numbers that are not finite.
        """
        from PIL import Image

        family, device = self.inputs.family, self.accelerator.device
        if self._pipeline is None:
            dtype = DTYPES[self.params.prompts.precision]
            self._pipeline = family.load_pipeline(self.inputs.source, transformer=False, dtype=dtype).to(device)
        sigmas, pictures = inference_sigmas(steps, self.inputs.shift), []
        with exchanged(self.state.average, self.state.student.parameters):
            for offset, text in enumerate([texts] if isinstance(texts, str) else texts):
                encoded = family.encode(self._pipeline, [text], self.params.prompts.max_sequence_length)
                check_finite(encoded, self._pipeline, self.inputs.source, "prompts.precision")
                conditioning = as_float32(encoded, device)
                noise = picture_noise(seed + offset, self.inputs.latent_shape).to(device)
                latents = draw_student(self.state.networks, noise, conditioning, sigmas)
                picture = family.decode(self._pipeline, latents)
                made = {"latents": latents, "pictures": picture}
                check_finite(made, self._pipeline, self.inputs.source, "prompts.precision")
                image = to_bytes(picture)[0]
                pictures.append(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()))
        return pictures

    def checkpoint(self) -> None:
        """Saves the state of the training, so that the same `Distillation` goes on from here another time."""
        self._saver.save(self.state.checkpoint())
        self._saver.wait()

    def save(self, student: str | Path) -> Path:
        """Writes the moving average of the student as a folder that diffusers loads, with its log beside it."""
        folder = at_home(student)
        save_student(self.state.networks, self.state.average, self.inputs, self.params, folder)
        write_log(self.state.rows, folder.with_name(f"{folder.name}.csv"))
        return folder
