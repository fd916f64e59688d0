"""Quality during training: a probe draws samples and gives their Fréchet distance to the teacher's samples.

The losses do not say how good a student is, because they measure a difference to a fake score that moves with it. A
probe draws with the moving average of the student, on the prompts of the teacher's full-length latents. Its features
are statistics of latents, which every family has. It draws from noise that nothing else uses: a student that is kept
for its probe was not chosen on the noise that it is evaluated on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from cdm.data.reference import Reference
from cdm.evaluation.distances import deviation, fit_gaussian, gaussian_distance
from cdm.flow import inference_sigmas
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


class QualityProbe:
    """Measures a student against `reference` with `settings.samples` samples, shared out over the processes.

    Sample j belongs to prompt `j % prompts`; the reference is all cached latents of the prompts that occur.
    `batch` samples are drawn at once.
    """

    def __init__(
        self,
        settings: Probe,
        reference: Reference,
        networks: Networks,
        *,
        seed: int,
        shift: float,
        latent_shape: Sequence[int],
        batch: int,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.reference, self.networks = settings, reference, networks
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

    def measure(self, student: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Figures:
        """`probe_stepsN` for each number of steps, and `probe`, their mean; the same in every process.

        It measures the `average` of the parameters `student`; both end as they were.
        """
        with exchanged(average, student):
            figures = {f"probe_steps{steps}": self._distance(steps) for steps in self.settings.steps}
        return {**figures, "probe": math.fsum(figures.values()) / len(figures)}

    def _distance(self, steps: int) -> float:
        count, processes = self.settings.samples, self.accelerator.num_processes
        share = -(-count // processes)
        first = self.accelerator.process_index * share
        samples = [sample % count for sample in range(first, first + share)]  # the last process may repeat some
        parts = [
            self._draw(samples[start : start + self.batch], steps) for start in range(0, share, self.batch)
        ]
        features = torch.cat([latent_features(part) for part in parts])
        device = self.accelerator.device
        if processes > 1:
            features = self.accelerator.gather(features.to(device)).cpu()[:count]
        distance = gaussian_distance(fit_gaussian(features / self.scale), self.target)
        if processes > 1:
            distance = float(broadcast(torch.tensor(distance, dtype=torch.float64, device=device)))
        return distance

    def _draw(self, samples: list[int], steps: int) -> Tensor:
        device = self.accelerator.device
        noise = Draws(self.seed, 0, samples, device).normal("probe", self.latent_shape)
        prompts = [sample % len(self.reference.prompts) for sample in samples]
        conditioning = self.reference.prompts.conditioning(prompts, device)
        return draw_student(self.networks, noise, conditioning, inference_sigmas(steps, self.shift))
