"""Sheets of pictures during training: samples of the student, and the three networks' x0 at one noisy point."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cdm.data.prompt_set import PromptSet
from cdm.data.spread import spread
from cdm.evaluation.plots import losses
from cdm.evaluation.sheets import Column, Group, compose, png
from cdm.evaluation.theme import LIGHT
from cdm.families import Family
from cdm.families.base import expand_to_batch
from cdm.flow import add_noise, inference_sigmas, velocity_to_x0
from cdm.measures import steps_in_words
from cdm.params import Params
from cdm.randomness import Draws, sample_noise
from cdm.rollout import Conditioning, integrate, take
from cdm.system.files import write_bytes
from cdm.training.networks import Networks, Role
from cdm.training.probe import decoded, draw_student, exchanged

PROMPTS = 8
STEPS = (1, 4)
LEVEL = 0.6
"""Noise level at which the three networks are compared."""
TILE = 128
ROLES: tuple[Role, ...] = ("student", "teacher", "fake")


@dataclass(frozen=True)
class Subject:
    """The prompts and noise of every sheet: `prompts` out of `texts`, each with one of the evaluation's noises.

    `teacher_steps` and `guidance_scale` are those of the teacher's pictures beside the student's.
    """

    texts: list[str]
    prompts: list[int]
    noise: Tensor
    conditioning: Conditioning
    empty: Conditioning
    teacher_steps: int
    guidance_scale: float

    @classmethod
    def choose(
        cls, params: Params, evaluation: PromptSet, empty: Conditioning, shape: Sequence[int]
    ) -> Subject:
        """`PROMPTS` prompts spread over the list, with the first noise of each."""
        prompts = spread(len(evaluation), PROMPTS)
        noise = sample_noise(params.seed, [prompt * params.latents.per_prompt for prompt in prompts], shape)
        conditioning = evaluation.conditioning(prompts)
        steps, scale = params.latents.steps, params.teacher.guidance_scale
        return cls(evaluation.texts, prompts, noise, conditioning, empty, steps, scale)

    def part(self, rows: slice, device: torch.device) -> Subject:
        """Some of the prompts, on `device`."""
        return replace(
            self,
            prompts=self.prompts[rows],
            noise=self.noise[rows].to(device),
            conditioning={name: value.to(device) for name, value in take(self.conditioning, rows).items()},
            empty={name: value.to(device) for name, value in self.empty.items()},
        )


class Gallery:
    """Draws the same prompts and noise at intervals while the student is trained, `batch` prompts at once; the
    autoencoder decodes in `dtype`.

    Every process computes, because sharded networks need all of them; the main one decodes and writes. Sheets are
    written to `kept`, which outlives an interruption, and copied to `out`.
    """

    def __init__(
        self,
        family: Family,
        source: Path,
        subject: Subject,
        networks: Networks,
        *,
        seed: int,
        shift: float,
        batch: int,
        dtype: torch.dtype = torch.float32,
        accelerator: Accelerator,
        kept: Path,
        out: Path,
    ) -> None:
        self.family, self.source, self.subject, self.networks = family, source, subject, networks
        self.seed, self.shift, self.accelerator = seed, shift, accelerator
        self.kept, self.out, self.dtype = kept, out, dtype
        self.roles = [role for role in ROLES if role == "teacher" or networks.parameters(role)]
        rows = [slice(start, start + batch) for start in range(0, len(subject.prompts), batch)]
        self.parts = [subject.part(each, accelerator.device) for each in rows]
        self.teacher = torch.empty(0)
        self.pipeline: Any = None

    def open(self, iteration: int) -> None:
        """Empties `out`, but for what was kept of a run that goes on at `iteration`; draws what never changes.

        Raises CdmError if the autoencoder cannot be loaded.
        """
        if self.accelerator.is_main_process:
            pipeline = self.family.load_pipeline(self.source, text=False, transformer=False, dtype=self.dtype)
            self.pipeline = pipeline.to(self.accelerator.device)
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir(parents=True)
            for path in sorted(self.kept.glob("*.png")):
                number = path.stem.removeprefix("iteration-")
                if (
                    not number.isdigit() or int(number) <= iteration
                ):  # not one of a sheet: the curves, to be redrawn
                    shutil.copy(path, self.out)
        self.teacher = torch.cat([self._by_teacher(part) for part in self.parts])

    def show(
        self,
        iteration: int,
        rows: Sequence[Mapping[str, float]],
        student: Mapping[str, Tensor],
        average: Mapping[str, Tensor],
    ) -> None:
        """Writes the sheet of `iteration` and the curves of the log's `rows`; parameters end as they were."""
        columns = self.latents(student, average)
        if self.accelerator.is_main_process:
            self._write(f"iteration-{iteration:06d}.png", self.sheet(columns))
            if points := curves(rows):
                self._write("curves.png", losses(points))

    @torch.no_grad()
    def latents(self, student: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents (prompts, ...) of each column, on the CPU: `average1`, `student4`, `x0_fake`, ..."""
        columns = [self._now(part) for part in self.parts]
        with exchanged(average, student):
            for column, part in zip(columns, self.parts, strict=True):
                column |= self._by_student("average", part)
        return {name: torch.cat([column[name].cpu() for column in columns]) for name in columns[0]}

    @torch.no_grad()
    def _by_teacher(self, part: Subject) -> Tensor:
        """The teacher's samples, on the CPU; with guidance at two evaluations a step."""

        def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            conditional = self.networks.velocity("teacher", x, sigma, conditioning)
            if part.guidance_scale == 1:
                return conditional
            empty = expand_to_batch(part.empty, len(x))
            return self.family.guide(
                conditional, self.networks.velocity("teacher", x, sigma, empty), part.guidance_scale
            )

        sigmas = inference_sigmas(part.teacher_steps, self.shift)
        return integrate(velocity, part.noise, part.conditioning, sigmas).cpu()

    def _by_student(self, name: str, part: Subject) -> dict[str, Tensor]:
        """What the student's present parameters draw."""
        return {
            f"{name}{steps}": draw_student(
                self.networks, part.noise, part.conditioning, inference_sigmas(steps, self.shift)
            )
            for steps in STEPS
        }

    def _now(self, part: Subject) -> dict[str, Tensor]:
        """What the student draws now, and the x0 that each network sees in its best sample behind noise."""
        drawn = self._by_student("student", part)
        x0 = drawn[f"student{max(STEPS)}"]
        sigma = torch.full((len(x0),), LEVEL, device=x0.device)
        noise = Draws(self.seed, 0, part.prompts, x0.device).normal("pictures", x0.shape[1:])
        x = add_noise(x0, noise, sigma)
        seen = {
            f"x0_{role}": velocity_to_x0(x, self.networks.velocity(role, x, sigma, part.conditioning), sigma)
            for role in self.roles
        }
        return {**drawn, **seen}

    def sheet(self, latents: Mapping[str, Tensor]) -> bytes:
        """The columns as a labelled PNG, a row for each prompt."""

        def column(name: str, heading: str, note: str = "") -> Column:
            return Column(heading, note, self._decode(latents[name])[:, None])

        def drawn(name: str) -> list[Column]:
            return [column(f"{name}{n}", steps_in_words(n)) for n in STEPS]

        guided = "" if self.subject.guidance_scale == 1 else "guided"
        teacher = Column(
            steps_in_words(self.subject.teacher_steps), guided, self._decode(self.teacher)[:, None]
        )
        groups = [
            Group("teacher", "Teacher", [teacher]),
            Group("student", "Student, average", drawn("average")),
            Group("student", "Student, now", drawn("student")),
            Group(
                "teacher",
                f"x0 seen at noise level {LEVEL}",
                [column(f"x0_{role}", "fake score" if role == "fake" else role) for role in self.roles],
            ),
        ]
        texts = [self.subject.texts[prompt] for prompt in self.subject.prompts]
        return png(compose(texts, groups, TILE, LIGHT))

    def _decode(self, latents: Tensor) -> Tensor:
        """uint8 (n, 3, height, width)."""
        return torch.cat(list(decoded(self.family, self.pipeline, latents, self.accelerator.device)))

    def _write(self, name: str, content: bytes) -> None:
        for folder in (self.kept, self.out):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, content)


def curves(rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Points (iteration, value) by column of the log's rows."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "iteration":
                points.setdefault(name, []).append((row["iteration"], value))
    return points
