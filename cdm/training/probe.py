"""Quality during training: a probe draws samples and says how far they are from the teacher's.

The losses do not say how good a student is, because they measure a difference to a fake score that moves with it. A
probe draws with the moving average of the student, on the prompts of the teacher's full-length latents. Its features
are statistics of latents, which every family has; measures of pictures without a model (`distill.probe.metrics`) can be
had beside them. It draws from noise that nothing else uses: a student that is kept
for its probe was not chosen on the noise that it is evaluated on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from cdm.data.reference import Reference
from cdm.evaluation.distances import deviation, fit_gaussian, gaussian_distance
from cdm.evaluation.looks import look_at
from cdm.families import Family
from cdm.flow import inference_sigmas
from cdm.measures import MEASURES
from cdm.params import Probe
from cdm.randomness import Draws
from cdm.rollout import Conditioning, integrate
from cdm.training.networks import Networks

CELLS = 4
OCTAVES = 5
READ_AT_ONCE = 64

Figures = dict[str, float]


def latent_features(latents: Tensor) -> Tensor:
    """Layout and texture of latents (n, channels, height, width): (n, features), float64, on the CPU.

    For each channel the means of 4x4 cells, the deviation, and in each of up to five octaves the mean absolute
    detail (what halving the size loses): blur and noise show in the latter, composition and colour in the former.
    """
    level = latents.detach().cpu().double()  # Apple's GPUs have no double precision
    features = [F.adaptive_avg_pool2d(level, CELLS).flatten(1), level.std((2, 3))]
    for _ in range(OCTAVES):
        if min(level.shape[2:]) < 4:
            break
        coarse = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
        features.append((level - F.interpolate(coarse, size=level.shape[2:])).abs().mean((2, 3)))
        level = coarse
    return torch.cat(features, dim=1)


def falls_due(every: int, since: int, now: int, last: int) -> bool:
    """Whether something that happens every so many iterations, and at the `last`, falls between `since` and `now`;
    never where `every` is 0."""
    return every > 0 and (now // every > since // every or now == last)


@torch.no_grad()
def exchange(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Swaps the values of the tensors of the same name in `first` and `second`, bit for bit."""
    for name, value in first.items():
        before = value.detach().clone()
        value.copy_(second[name])
        second[name].copy_(before)


@contextmanager
def exchanged(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[None]:
    """`exchange`, until the end of the block."""
    exchange(first, second)
    try:
        yield
    finally:
        exchange(first, second)


def draw_student(networks: Networks, noise: Tensor, conditioning: Conditioning, sigmas: Tensor) -> Tensor:
    """Latents that the student draws from `noise` with an evaluation at each of `sigmas`, without guidance."""

    def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return networks.velocity("student", x, sigma, conditioning)

    return integrate(velocity, noise, conditioning, sigmas)


def decoded(family: Family, pipeline: Any, latents: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The picture of each of the latents, uint8 (1, 3, height, width), on the CPU, one at a time: at 1024² an
    autoencoder needs gigabytes for each."""
    for each in latents:
        picture = family.decode(pipeline, each[None].to(device)).cpu()
        yield (picture * 255).round().to(torch.uint8)


class Looks:
    """What measures of pictures without a model (`names`) see of latents, which the autoencoder of the pipeline at
    `source` decodes one at a time: in float32, since the student that is kept may depend on it, and no precision of
    pictures shapes a training. Raises CdmError if it cannot be loaded."""

    def __init__(self, family: Family, source: Path, names: Sequence[str], device: torch.device) -> None:
        self.family, self.names, self.device = family, names, device
        self.pipeline = family.load_pipeline(source, text=False, transformer=False).to(device)

    def __call__(self, latents: Tensor) -> Tensor:
        """float64 (n, values), on the CPU; a value for each quantity of each measure."""
        pictures = decoded(self.family, self.pipeline, latents, self.device)
        return torch.cat([look_at(self.names, picture) for picture in pictures])


def deviations(names: Sequence[str], student: Tensor, teacher: Tensor) -> Figures:
    """How far the mean values of the student's pictures are from the teacher's, both (values,), by name of measure.

    A measure of one quantity has the relative difference, with its sign: 0.18 is 18 % above the teacher's. One of
    several, a colour, has the length of the difference.
    """
    found, first = {}, 0
    for name in names:
        last = first + len(MEASURES[name].quantities)
        ours, theirs = student[first:last], teacher[first:last]
        alone = last - first == 1
        difference = (ours / theirs.clamp(min=1e-6) - 1) if alone else (ours - theirs).norm()
        found[name], first = difference.item(), last
    return found


class QualityProbe:
    """Measures a student against `reference` with `settings.samples` samples, shared out over the processes.

    Sample j belongs to prompt `j % prompts`; the reference is all cached latents of the prompts that occur. Where there
    are measures of pictures, `looks` sees them, and as many of the reference as samples are drawn. `batch` samples are
    drawn at once.
    """

    def __init__(
        self,
        settings: Probe,
        reference: Reference,
        networks: Networks,
        looks: Callable[[Tensor], Tensor] | None = None,
        *,
        seed: int,
        shift: float,
        latent_shape: Sequence[int],
        batch: int,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.reference, self.networks, self.looks = settings, reference, networks, looks
        self.seed, self.shift, self.latent_shape = seed, shift, latent_shape
        self.batch, self.accelerator = batch, accelerator
        prompts = min(settings.samples, len(reference.prompts))
        count = prompts * reference.per_prompt
        features = torch.cat(
            [
                latent_features(reference.cache.rows(range(first, min(first + READ_AT_ONCE, count)))["latents"])
                for first in range(0, count, READ_AT_ONCE)
            ]
        )
        self.scale = deviation(features)
        self.target = fit_gaussian(features / self.scale)
        self.teacher = torch.empty(0)
        if looks is not None:
            wanted = min(settings.samples, count)
            rows = [sample % prompts * reference.per_prompt + sample // prompts for sample in range(wanted)]
            cache = reference.cache
            self.teacher = self._over_processes(
                wanted, lambda samples: looks(cache.rows([rows[sample] for sample in samples])["latents"])
            ).mean(0)

    def measure(self, student: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Figures:
        """`probe_stepsN` for each number of steps, and `probe`, their mean; for each measure of pictures the same, as
        `probe_NAME_stepsN` (`deviations`) and `probe_NAME`, the mean of their sizes. The same in every process.

        It measures the `average` of the parameters `student`; both end as they were.
        """
        steps, names = self.settings.steps, self.settings.metrics
        with exchanged(average, student):
            found = {each: self._at(each) for each in steps}
        figures = {f"probe_steps{each}": found[each]["distance"] for each in steps}
        figures |= {"probe": math.fsum(figures.values()) / len(figures)}
        for name in names:
            figures |= {f"probe_{name}_steps{each}": found[each][name] for each in steps}
            figures[f"probe_{name}"] = math.fsum(abs(found[each][name]) for each in steps) / len(steps)
        return figures

    def _at(self, steps: int) -> Figures:
        """`distance`, and the deviation of each measure of pictures, at a number of steps."""
        looks, width = self.looks, self.scale.shape[-1]

        def look(samples: list[int]) -> Tensor:
            latents = self._draw(samples, steps)
            features = latent_features(latents)
            return features if looks is None else torch.cat([features, looks(latents)], 1)

        rows = self._over_processes(self.settings.samples, look)
        features, seen = rows[:, :width], rows[:, width:].mean(0)
        found = {"distance": gaussian_distance(fit_gaussian(features / self.scale), self.target)}
        found |= deviations(self.settings.metrics, seen, self.teacher)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            figures = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
            found = dict(zip(found, broadcast(figures).tolist(), strict=True))
        return found

    def _over_processes(self, count: int, look: Callable[[list[int]], Tensor]) -> Tensor:
        """What `look` makes of samples (their numbers), a row each, float64: of all `count` of them, each process
        working on its share, `batch` at once."""
        processes = self.accelerator.num_processes
        share = -(-count // processes)
        first = self.accelerator.process_index * share
        samples = [sample % count for sample in range(first, first + share)]  # the last process may repeat some
        rows = torch.cat([look(samples[start : start + self.batch]) for start in range(0, share, self.batch)])
        if processes > 1:
            rows = self.accelerator.gather(rows.to(self.accelerator.device)).cpu()[:count]
        return rows

    def _draw(self, samples: list[int], steps: int) -> Tensor:
        device = self.accelerator.device
        noise = Draws(self.seed, 0, samples, device).normal("probe", self.latent_shape)
        prompts = [sample % len(self.reference.prompts) for sample in samples]
        conditioning = self.reference.prompts.conditioning(prompts, device)
        return draw_student(self.networks, noise, conditioning, inference_sigmas(steps, self.shift))
