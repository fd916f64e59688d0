"""The exact world: a mixture as the teacher, small networks as student and fake score, and the training step.

What is trained here is trained by `cdm.training.distiller` with the settings of `cdm.params`. Only the networks
differ from a large run, and the random numbers, which come for a whole batch at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.families.base import PromptEmbedding
from cdm.flow import add_noise, inference_sigmas
from cdm.params import Distill, Optimiser, Schedule
from cdm.randomness import Draws, philox
from cdm.rollout import Conditioning, Velocity, integrate, take
from cdm.training.distiller import Distiller
from cdm.training.networks import LevelAwareFake, Networks, Role, Trained
from cdm.training.optim import Learner
from cdm.training.state import TrainingState
from cdm.training.terms import Pairs
from exact.mixture import ALL, Mixture

SHIFT = 1.0
"""No timestep shift: the data are as large as the noise."""
FULL = 200
"""Euler steps of the teacher that stand for its exact solution."""


@functools.cache
def line() -> Mixture:
    """One class on a line, three narrow modes: a world whose noise levels fit on the paper beside it."""
    return Mixture.from_components([[-1.5], [0.2], [1.4]], [0.16, 0.13, 0.16], weights=[0.3, 0.4, 0.3])


@functools.cache
def two_spirals() -> Mixture:
    """Two classes, each an arm of four beads that winds out from the middle; beads lie along their arm."""
    means, covariances, classes = [], [], []
    for label in range(2):
        for bead in range(4):
            radius, angle = 0.55 + 0.45 * bead, math.pi * label + 0.85 * bead
            heading = angle + math.atan2(radius * 0.85, 0.45)
            along = torch.tensor([math.cos(heading), math.sin(heading)], dtype=torch.float64)
            across = torch.tensor([-math.sin(heading), math.cos(heading)], dtype=torch.float64)
            means.append([radius * math.cos(angle), radius * math.sin(angle)])
            covariances.append(0.20**2 * torch.outer(along, along) + 0.09**2 * torch.outer(across, across))
            classes.append(label)
    return Mixture.from_components(means, torch.stack(covariances), classes)


@torch.no_grad()
def draw(velocity: Velocity, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Samples (n, d) of `labels` in `steps` Euler steps from `noise`."""
    return integrate(velocity, noise, {"class": labels}, inference_sigmas(steps, SHIFT))


class PlaneModel(nn.Module):
    """A velocity field: (x (batch, d), sigma (batch,), class (batch,)) -> (batch, d).

    `embedding` (batch, width) is added to the first hidden layer.
    """

    octaves = 5

    def __init__(self, dimensions: int, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        inputs = dimensions + 2 * self.octaves + classes + 1
        self.inward = nn.Linear(inputs, width)
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, embedding: Tensor | None = None) -> Tensor:
        angles = sigma[:, None] * (math.pi / 2) * 2.0 ** torch.arange(self.octaves)
        named = F.one_hot(label - ALL, self.classes + 1).to(x.dtype)
        hidden = self.inward(torch.cat([x, angles.sin(), angles.cos(), named], dim=1))
        return self.layers(hidden if embedding is None else hidden + embedding)


class PlaneFamily(PromptEmbedding):
    """What `LevelAwareFake` needs of a family."""

    def __init__(self, width: int) -> None:
        self.width = width

    def embedding_width(self, conditioning: Conditioning) -> int:
        return self.width

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        return conditioning | {"embedding": embedding}


class ExactNetworks:
    """`cdm.training.networks.Networks` of the world: conditioning is {"class": (batch,)}, -1 being the empty prompt."""

    def __init__(self, mixture: Mixture, student: PlaneModel, fake: PlaneModel) -> None:
        self.mixture = mixture
        self.models: dict[str, PlaneModel] = {"student": student, "fake": fake}

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if role == "teacher":
            return self.mixture.velocity(x, sigma, conditioning["class"])
        model = self.models[role]
        return model(x, sigma, conditioning["class"], conditioning.get("embedding"))

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return dict(self.models[role].named_parameters())

    def casting_once(self) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, role: Trained, loss: Tensor) -> None:
        loss.backward()

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), folder / "student.safetensors")


class BatchDraws(Draws):
    """Draws of one generator for all samples: here one process has them all, and drawing would take longest."""

    def _whole(self, purpose: str) -> np.random.Generator:
        return philox(self.seed, purpose, self.iteration)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        numbers = self._whole(purpose).standard_normal((len(self.samples), *shape), dtype=np.float32)
        return torch.from_numpy(numbers)

    def uniform(self, purpose: str) -> Tensor:
        return torch.from_numpy(self._whole(purpose).random(len(self.samples), dtype=np.float32))

    def integers(self, purpose: str, high: int) -> list[int]:
        return self._whole(purpose).integers(high, size=len(self.samples)).tolist()

    def generators(self, purpose: str) -> list[torch.Generator]:
        shared = torch.Generator().manual_seed(int(self._whole(purpose).integers(2**63)))
        return [shared] * len(self.samples)


class BatchDistiller(Distiller):
    """The training step with `BatchDraws`."""

    def draws(self, iteration: int, samples: Sequence[int]) -> Draws:
        return BatchDraws(self.seed, iteration, samples)


START = Optimiser(lr=2e-3, warmup=50, decay_from=0.3, weight_decay=0.0)


@dataclass(frozen=True)
class World:
    """A mixture, and how the networks that start as the teacher are made: their width, and for how long they are
    fitted to the exact velocity."""

    mixture: Mixture
    width: int = 96
    start_updates: int = 2500
    start_batch: int = 512

    def model(self) -> PlaneModel:
        return PlaneModel(self.mixture.dimensions, self.mixture.class_count, self.width)

    @functools.cache  # noqa: B019 - a run has one or two worlds, and they last as long as it does
    def start(self, seed: int) -> dict[str, Tensor]:
        """Weights fitted to the exact velocity by regression: student and fake score start as the teacher."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model()
        learner = Learner(dict(model.named_parameters()), START, self.start_updates)
        for _ in range(self.start_updates):
            labels = torch.randint(ALL, self.mixture.class_count, (self.start_batch,), generator=generator)
            x0 = self.mixture.sample(self.start_batch, labels, generator)
            sigma = torch.rand(self.start_batch, generator=generator)
            x = add_noise(x0, torch.randn(x0.shape, generator=generator), sigma)
            F.mse_loss(model(x, sigma, labels), self.mixture.velocity(x, sigma, labels)).backward()
            learner.step()
        return {name: value.detach() for name, value in model.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> PlaneModel:
        """A model of these weights, of its own."""
        model = self.model()
        model.load_state_dict(weights)
        return model

    def prompts(self, iteration: int, samples: Sequence[int]) -> Conditioning:
        """The classes in turn."""
        return {"class": torch.tensor(samples) % self.mixture.class_count}

    @functools.cache  # noqa: B019 - as above
    def drawn(self, seed: int, count: int = 4096) -> Pairs:
        """Noise of the classes in turn, and where the exact velocity leads it: what a regression learns from."""
        labels = torch.arange(count) % self.mixture.class_count
        noise = torch.randn(count, self.mixture.dimensions, generator=torch.Generator().manual_seed(seed))
        return Pairs(noise, draw(self.mixture.guided_velocity(1), noise, labels, FULL), {"class": labels})

    def pairs(self, draws: Draws) -> Pairs:
        """Pairs for an iteration's samples, each drawn anew from all that there are."""
        noise, x0, conditioning = self.drawn(draws.seed)
        rows = torch.tensor(draws.integers("pair", len(noise)))
        return Pairs(noise[rows], x0[rows], take(conditioning, rows))

    def networks(self, distill: Distill, seed: int) -> Networks:
        """The three roles at the start of a training."""
        networks = ExactNetworks(self.mixture, self.load(self.start(seed)), self.load(self.start(seed)))
        if not distill.fake_knows_level:
            return networks
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LevelAwareFake(networks, PlaneFamily(self.width), {})

    def prepare(self, schedule: Schedule, distill: Distill, seed: int) -> tuple[BatchDistiller, TrainingState]:
        """The training step at its start, and what it moves."""
        networks = self.networks(distill, seed)
        state = TrainingState.start(networks, distill)
        distiller = BatchDistiller(
            networks,
            state.student,
            state.fake,
            distill=distill,
            schedule=schedule,
            shift=SHIFT,
            seed=seed,
            prompts=self.prompts,
            empty={"class": torch.tensor([ALL])},
            latent_shape=(self.mixture.dimensions,),
            pairs=self.pairs,
            samples=range(distill.batch_size),
        )
        return distiller, state

    def distil(self, schedule: Schedule, distill: Distill, seed: int) -> PlaneModel:
        """The student, its moving average, after a whole training."""
        distiller, state = self.prepare(schedule, distill, seed)
        advance(distiller, state, distill.iterations)
        return self.load(state.average)


def advance(distiller: Distiller, state: TrainingState, until: int) -> None:
    """Rounds up to iteration `until`."""
    distill = distiller.distill
    for iteration in range(state.iteration, until, distill.student_every):
        state.after_round(distiller.round(iteration), iteration, distill)
