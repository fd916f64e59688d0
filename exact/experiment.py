"""The experiment: students of several methods and seeds, measured against the truth at several numbers of steps."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cdm.randomness import sample_noise
from cdm.rollout import Conditioning, Velocity
from exact.distances import energy_distance, sliced_wasserstein
from exact.methods import METHODS
from exact.mixture import Mixture
from exact.world import FULL, PlaneModel, World, draw

STEPS = (1, 2, 3, 4, 6, 8)
"""At 1, 2 and 4 all levels are of the fixed list; at the others some are on none."""
TRUTH = "truth"
TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """One sample set against the truth: means over the classes."""

    method: str
    guidance: float
    seed: int
    steps: int
    energy_distance: float
    sliced_wasserstein: float
    negative_log_likelihood: float
    """Under the exact density of the sample's class, in nats; that of perfect samples is the entropy."""
    seconds: float
    """Time of the training."""


@dataclass(frozen=True)
class Judge:
    """Sample sets of `per_class` samples of each class against as many true ones.

    Without guidance the truth is the mixture; with it there is no closed form, and the truth is where the exact
    guided velocity leads in `FULL` steps.
    """

    mixture: Mixture
    guidance: float
    seed: int
    per_class: int = 1024

    def labels(self) -> Tensor:
        return torch.arange(self.mixture.class_count).repeat_interleave(self.per_class)

    def noise(self) -> Tensor:
        return sample_noise(self.seed, range(len(self.labels())), (self.mixture.dimensions,))

    def truth(self, offset: int) -> Tensor:
        """True samples in the order of `labels`; another `offset` gives others."""
        labels = self.labels()
        generator = torch.Generator().manual_seed(2 * self.seed + offset)
        if self.guidance == 1:
            return self.mixture.sample(len(labels), labels, generator)
        noise = torch.randn(len(labels), self.mixture.dimensions, generator=generator)
        return draw(self.mixture.guided_velocity(self.guidance), noise, labels, FULL)

    def measure(self, samples: Tensor) -> tuple[float, float, float]:
        """Energy distance, sliced Wasserstein distance, negative log-likelihood of samples in `labels`' order."""
        labels = self.labels()
        pairs = list(zip(_by_class(samples, self), _by_class(_truth(self), self), strict=True))
        return (
            statistics.fmean(energy_distance(a, b) for a, b in pairs),
            statistics.fmean(sliced_wasserstein(a, b) for a, b in pairs),
            -float(self.mixture.log_density(samples, 0.0, labels).mean()),
        )


def _by_class(samples: Tensor, judge: Judge) -> Sequence[Tensor]:
    return samples.double().split(judge.per_class)


@cache
def _truth(judge: Judge) -> Tensor:
    return judge.truth(0)


def velocity_of(model: PlaneModel) -> Velocity:
    """A model as the samplers take it."""

    def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return model(x, sigma, conditioning["class"])

    return velocity


def measure(
    judge: Judge, velocity: Velocity, method: str, steps: Iterable[int], seconds: float = 0.0
) -> list[Row]:
    """A row for each number of steps."""
    rows = []
    for count in steps:
        samples = draw(velocity, judge.noise(), judge.labels(), count)
        rows.append(Row(method, judge.guidance, judge.seed, count, *judge.measure(samples), seconds))
    return rows


def run(
    world: World, names: Sequence[str], seeds: Sequence[int], report: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """All methods with all seeds, the teacher beside them, and other true samples: what a perfect student gets."""
    rows: list[Row] = []
    for seed in seeds:
        for guidance in sorted({METHODS[name].guidance for name in names}):
            judge = Judge(world.mixture, guidance, seed)
            rows += measure(judge, world.mixture.guided_velocity(guidance), TEACHER, STEPS)
            rows.append(Row(TRUTH, guidance, seed, 0, *judge.measure(judge.truth(1)), 0.0))
        for name in names:
            method = METHODS[name]
            world.start(seed)
            began = time.perf_counter()
            student = world.distil(method.schedule, method.distill, seed)
            seconds = time.perf_counter() - began
            judge = Judge(world.mixture, method.guidance, seed)
            rows += measure(judge, velocity_of(student), name, STEPS, seconds)
            report(f"seed {seed}: {name}, {seconds:.0f} s")
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            rounded = {
                name: float(f"{value:.5g}") for name, value in values.items() if isinstance(value, float)
            }
            writer.writerow(values | rounded)


def table(rows: Sequence[Row], figure: str, scale: float = 1.0) -> str:
    """A Markdown table of `figure` times `scale`: mean and deviation over seeds, a column a number of steps."""
    lines = ["| | " + " | ".join(f"{steps}" for steps in STEPS) + " |", "| --- |" + " --- |" * len(STEPS)]
    guidances = sorted({row.guidance for row in rows})
    for guidance in guidances:
        block = [row for row in rows if row.guidance == guidance]
        for method in dict.fromkeys(row.method for row in block):
            of_method = [row for row in block if row.method == method]
            cells = [
                _cell([scale * getattr(row, figure) for row in of_method if row.steps in (0, steps)])
                for steps in STEPS
            ]
            lines.append(f"| {title_of(method, guidance)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def title_of(method: str, guidance: float) -> str:
    """A row's name in a table; the truth and the teacher depend on the guidance."""
    guided = "" if guidance == 1 else f", guidance {guidance:g}"
    if method == TRUTH:
        return f"*true samples{guided}*"
    if method == TEACHER:
        return f"*teacher{guided}*"
    return METHODS[method].label


def _cell(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
