"""What an iteration costs: ours against the plain order of operations, as ratios from one run.

    python -m benchmarks.iteration [--seconds 60]

First both orders run on the same random numbers and must agree on every loss and every weight. Then, at the
authors' settings (N ~ U{1..28}, two fake-score updates a student update) and at the miniature's, it counts forwards
(a forward with its backward as 3) and FLOPs, and times both. The real architectures are counted on meta tensors.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cdm.families import get_family
from cdm.params import Distill, Params, Schedule, load
from cdm.planning.architecture import published
from cdm.planning.plan import flops
from cdm.system import boundary
from cdm.training.distiller import Distiller
from cdm.training.optim import Learner
from reference.costs import AUTHORS, BATCH, Cost, count
from reference.counting import CountingNetworks
from reference.plain import PlainDistiller

EVERY = 2  # fake-score updates a student update, as the authors have it
PUBLISHED = {
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "longcat": "meituan-longcat/LongCat-Image",
}
"""Architectures that are counted on meta tensors, by family."""


class World:
    """The miniature's teacher with a batch of its prompts, or so many of them."""

    def __init__(self, params: Params, count: int = BATCH) -> None:
        self.params, self.source = params, Path(params.teacher.source)
        self.family = get_family(params.teacher.family)
        pipeline = self.family.load_pipeline(self.source, image=False)
        texts = Path(params.prompts.train[0]).read_text().splitlines()[:count]
        length = params.prompts.max_sequence_length
        self.conditioning = self.family.encode(pipeline, texts, length)
        self.empty = self.family.encode(pipeline, [""], length)
        self.teacher = self.family.load_transformer(self.source)

    def distiller(
        self, kind: type[Distiller | PlainDistiller], schedule: Schedule, rollouts: str
    ) -> tuple[Distiller | PlainDistiller, CountingNetworks]:
        changes = {
            "batch_size": BATCH,
            "rollouts": rollouts,
            "fake_only": 0,
            "student_every": EVERY,
            "fake_knows_level": False,
        }
        distill = Distill.model_validate(self.params.distill.model_dump() | changes)
        networks = CountingNetworks(self.family, copy.deepcopy(self.teacher))
        distiller = kind(
            networks,
            Learner(networks.parameters("student"), distill.student, 1000),
            Learner(networks.parameters("fake"), distill.fake, 1000),
            distill=distill,
            schedule=schedule,
            shift=self.family.shift(self.source),
            seed=0,
            prompts=lambda _, samples: {name: v[list(samples)] for name, v in self.conditioning.items()},
            empty=self.empty,
            latent_shape=self.family.latent_shape(self.source),
            samples=range(BATCH),
        )
        return distiller, networks


def check_equal(world: World, schedule: Schedule, rollouts: str) -> float:
    """The largest relative difference of any loss or weight after a round on the same random numbers."""
    (ours, networks), (plain, plain_networks) = (
        world.distiller(kind, schedule, rollouts) for kind in (Distiller, PlainDistiller)
    )
    measured, expected = ours.round(0), plain.round(0)
    differences = [abs(measured[name] - value) / abs(value) for name, value in expected.items() if value]
    for role in ("student", "fake"):
        other: dict[str, Tensor] = dict(plain_networks.models[role].named_parameters())
        for name, value in networks.models[role].named_parameters():
            gap = (value - other[name]).detach().norm() / other[name].detach().norm().clamp(min=1e-6)
            differences.append(float(gap))
    return max(differences)


def measure(world: World, schedule: Schedule, seconds: float) -> tuple[Cost, Cost]:
    """Counted FLOPs and time of an iteration on the miniature, (ours, plain), in alternation on the same rounds."""
    contenders = [
        world.distiller(Distiller, schedule, "shared"),
        world.distiller(PlainDistiller, schedule, "fresh"),
    ]
    costs = [Cost(0, 0), Cost(0, 0)]
    for distiller, _ in contenders:
        distiller.round(0)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or rounds < 3:
        rounds += 1
        for (distiller, _), cost in zip(contenders, costs, strict=True):
            before = time.perf_counter()
            distiller.round(EVERY * rounds)
            cost.seconds += time.perf_counter() - before
    for (distiller, _), cost in zip(contenders, costs, strict=True):
        cost.seconds /= rounds * EVERY
        counted = min(rounds, 6)
        with FlopCounterMode(display=False) as counter:
            for number in range(1, counted + 1):
                distiller.round(EVERY * number)
        cost.flops = counter.get_total_flops() / counted / EVERY / BATCH
    return costs[0], costs[1]


def main(
    seconds: Annotated[float, typer.Option(help="Time to spend on each timing, in seconds.")] = 60,
) -> None:
    """Compare an iteration of ours with the plain order of operations."""
    params = load(Path("params.yaml"))
    world = World(params)
    losses = params.distill.losses
    schedules = {"N ~ U{1..28}": AUTHORS, "this recipe's schedule": params.schedule}

    print("Same losses and weights after a round (largest relative difference):")
    for rollouts in ("shared", "fresh"):
        print(f"  rollouts {rollouts}: {check_equal(world, AUTHORS, rollouts):.1e}")

    for name, schedule in schedules.items():
        ours, unshared = (count(Distiller, schedule, kind, losses=losses) for kind in ("shared", "fresh"))
        plain = count(PlainDistiller, schedule, "fresh", losses=losses)
        print(f"\n{name}: forward-equivalents an iteration and sample")
        print(f"  plain {plain.equivalents:.2f}, ours {ours.equivalents:.2f}: {_ratio(plain, ours)}")
        print(f"  ours with a rollout of its own for every iteration {unshared.equivalents:.2f}")
        small, small_plain = measure(world, schedule, seconds)
        print(
            f"  the miniature, measured: FLOPs {small_plain.flops / small.flops:.2f}x fewer,"
            f" time {small_plain.seconds / small.seconds:.2f}x less ({1000 * small.seconds:.0f} ms an iteration)"
        )
        for family, source in PUBLISHED.items():
            architecture = published(get_family(family), source)
            forward, both = flops(architecture)
            total, total_plain = (c.forwards * forward + c.with_graph * both for c in (ours, plain))
            print(
                f"  {architecture.name}: {total / 1e12:.0f} against {total_plain / 1e12:.0f} TFLOP"
                f" a sample, {total_plain / total:.2f}x fewer (a forward is {forward / 1e12:.1f})"
            )


def _ratio(plain: Cost, ours: Cost) -> str:
    return f"{plain.equivalents / ours.equivalents:.2f}x fewer"


if __name__ == "__main__":
    boundary.run(boundary.program(main))
