"""How much a round's gradients vary, and at what cost: ours against the plain order, on the miniature.

    python -m benchmarks.variance [--rounds 32] [--train 60] [--authors]

An iteration is worth what it costs times the variance of its gradient: with half the variance half the batch would do.
After some rounds of training all weights are held, and rounds with other random numbers give the gradients: of the
student, and the mean of a round's updates of the fake score. Their variance is the sum over all weights. The plain
order draws one length and one index for the whole batch, and a rollout for every update, as the released code does; a
variant draws them for each sample. Ours is as the recipes have it; a variant lets CA share DM's points and draws each
update of the fake score for itself. What is not order is the recipe's in all: bounds, terms, the fake score that knows
the level. Costs are counted in forwards a sample, a forward with its backward as 3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor, nn

import reference.plain
from benchmarks.iteration import World
from cdm.params import Distill, Params, Schedule, load
from cdm.randomness import Draws
from cdm.schedule import Rollouts, draw_rollouts
from cdm.system import boundary
from cdm.training.distiller import Distiller
from cdm.training.networks import LevelAwareFake, Networks, Trained
from cdm.training.optim import Learner
from reference.costs import AUTHORS
from reference.counting import CountingNetworks
from reference.plain import PlainDistiller

BATCHES = (16, 128)
TRAINED_ON = 48
"""Samples of a round of the training that comes before."""
RESULTS = Path(__file__).parent / "results" / "variance.json"


@dataclass(frozen=True)
class Order:
    """A way to make a round: the engine, changes of `distill`, where CA re-noises, and whether a batch has one schedule
    and index."""

    kind: Callable[..., Any]
    distill: Mapping[str, Any]
    point: str = "own"
    one_for_all: bool = False


_PLAIN = {"rollouts": "fresh", "fake_draws": "independent"}
_OURS = {"rollouts": "shared", "fake_draws": "mirrored"}
RELEASED, OURS = "plain, one length and index a batch", "ours"
ORDERS = {
    RELEASED: Order(PlainDistiller, _PLAIN, one_for_all=True),
    "plain, of each sample": Order(PlainDistiller, _PLAIN),
    "ours, points shared, draws independent": Order(
        Distiller, _OURS | {"fake_draws": "independent"}, point="shared"
    ),
    OURS: Order(Distiller, _OURS),
}


class Recorder:
    """A learner that keeps gradients instead of following them."""

    lr, updates_done = 0.0, 0

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: list[Tensor] = []

    def step(self) -> float:
        parts = []
        for value in self.parameters.values():
            parts.append((torch.zeros_like(value) if value.grad is None else value.grad).flatten())
            value.grad = None
        self.gradients.append(torch.cat(parts))
        return float(self.gradients[-1].norm())


class TrainedWorld(World):
    """The miniature with its prompts, after some rounds of its training."""

    def __init__(self, params: Params, train: int) -> None:
        super().__init__(params, max(BATCHES))
        self.counted = CountingNetworks(self.family, self.teacher)
        self.networks: Networks = (
            LevelAwareFake(self.counted, self.family, self.empty)
            if params.distill.fake_knows_level
            else self.counted
        )
        distill = self._distill({"batch_size": TRAINED_ON}, params.distill.losses.ca.point)
        updates = distill.iterations // distill.student_every
        student, fake = (
            Learner(self.networks.parameters(role), settings, count)
            for role, settings, count in (
                ("student", distill.student, updates),
                ("fake", distill.fake, distill.iterations),
            )
        )
        distiller = self.engine(Distiller, distill, params.schedule, student, fake)
        for number in range(train):
            distiller.round(number * distill.student_every)

    def _distill(self, changes: Mapping[str, Any], point: str) -> Distill:
        values = self.params.distill.model_dump() | {"fake_only": 0} | dict(changes)
        values["losses"]["ca"]["point"] = point
        return Distill.model_validate(values)

    def engine(
        self, kind: Callable[..., Any], distill: Distill, schedule: Schedule, student: Any, fake: Any
    ) -> Any:
        return kind(
            self.networks,
            student,
            fake,
            distill=distill,
            schedule=schedule,
            shift=self.family.shift(self.source),
            seed=1,
            prompts=self._prompts,
            empty=self.empty,
            latent_shape=self.family.latent_shape(self.source),
            samples=range(distill.batch_size),
        )

    def _prompts(self, iteration: int, samples: Sequence[int]) -> dict[str, Tensor]:
        """Other prompts in every iteration."""
        count = len(next(iter(self.conditioning.values())))
        rows = [(iteration * 37 + sample) % count for sample in samples]
        return {name: value[rows] for name, value in self.conditioning.items()}

    def measure(self, order: Order, schedule: Schedule, batch: int, rounds: int) -> dict[str, Any]:
        """Forward-equivalents a sample and round, and the variance of a round's gradients with its error."""
        distill = self._distill({**order.distill, "batch_size": batch, "merge": 0.0}, order.point)
        recorders = {role: Recorder(self.networks.parameters(role)) for role in ("student", "fake")}
        engine = self.engine(order.kind, distill, schedule, recorders["student"], recorders["fake"])
        self.counted.samples.clear()
        with one_schedule(order.one_for_all):
            start = time.perf_counter()
            for number in range(1000, 1000 + rounds):
                engine.round(number * distill.student_every)
            seconds = time.perf_counter() - start
        found: dict[str, Any] = {
            "cost": self.counted.forward_equivalents(batch) / rounds,
            "seconds": seconds / rounds / batch,
        }
        for role, recorder in recorders.items():
            gradients = torch.stack(recorder.gradients)
            each = gradients.view(rounds, -1, gradients.shape[1]).mean(1)
            found[role] = variance(each)
        return found


@contextmanager
def one_schedule(wanted: bool) -> Iterator[None]:
    """Within it the plain order draws the first sample's schedule and anchor for the whole batch."""

    def draw(schedule: Schedule, shift: float, draws: Draws) -> Rollouts:
        return draw_rollouts(schedule, shift, replace(draws, samples=[draws.samples[0]] * len(draws.samples)))

    if not wanted:
        yield
        return
    with patch.object(reference.plain, "draw_rollouts", draw):
        yield


def variance(gradients: Tensor) -> dict[str, float]:
    """Of gradients (rounds, weights): the sum of the variances of all weights, its standard error by leaving each round
    out (jackknife), and the squared norm of the mean."""
    products = (gradients @ gradients.T).double()
    count = len(products)

    def of(rows: Tensor) -> Tensor:
        few = products[rows][:, rows]
        return (few.trace() - few.sum() / len(rows)) / (len(rows) - 1)

    every = torch.arange(count)
    without = torch.stack([of(every[every != row]) for row in range(count)])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    mean = (products.sum() - products.trace()) / (count * (count - 1))
    return {"variance": float(of(every)), "error": float(error), "mean": float(mean)}


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Ratios to the plain order of each schedule and batch."""
    lines = []
    for name, orders in results.items():
        base = next(iter(orders.values()))
        lines += [
            name,
            f"{'':40}{'cost':>6}{'student':>16}{'fake score':>16}{'cost x variance, times less':>30}",
        ]
        for order, found in orders.items():
            cells = [f"{found['cost']:>6.1f}"]
            roles: tuple[Trained, ...] = ("student", "fake")
            for role in roles:
                ratio = found[role]["variance"] / base[role]["variance"]
                relative = found[role]["error"] / found[role]["variance"]
                cells.append(f"{ratio:>8.3f} ± {ratio * relative:.3f}")
            less = [
                base["cost"] * base[role]["variance"] / (found["cost"] * found[role]["variance"])
                for role in roles
            ]
            lines.append(f"{order:40}" + "".join(cells) + f"{less[0]:>24.2f}, {less[1]:.2f}")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds whose gradients are compared.", min=3)] = 32,
    train: Annotated[int, typer.Option(help="Rounds of training before.", min=0)] = 60,
    out: Annotated[Path, typer.Option(help="File of results.")] = RESULTS,
    params: Annotated[Path, typer.Option(help="Whose training it is.")] = Path("params.yaml"),
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Samples of a batch; 16 and 128 without it.")
    ] = None,
    authors: Annotated[
        bool, typer.Option("--authors", help="The released order and ours with rollouts of 1 to 28 steps.")
    ] = False,
) -> None:
    """Measure cost and variance of a round's gradients."""
    settings = load(params)
    torch.set_num_threads(settings.runtime.threads or torch.get_num_threads())
    world = TrainedWorld(settings, train)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if (found.get("rounds"), found.get("train")) != (rounds, train):
        found = {"rounds": rounds, "train": train, "cases": {}}
    results: dict[str, dict[str, Any]] = found["cases"]
    for batch in batches or BATCHES:
        schedules = _authors() if authors else dict.fromkeys(ORDERS, settings.schedule)
        for name, schedule in schedules.items():
            case = f"{schedule.min_len} to {schedule.max_len} steps, batch of {batch}"
            results.setdefault(case, {})[name] = world.measure(ORDERS[name], schedule, batch, rounds)
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(results))


def _authors() -> dict[str, Schedule]:
    """The schedule of the released order, and of ours the same lengths and range, but stratified."""
    return {RELEASED: AUTHORS, OURS: AUTHORS.model_copy(update={"spacing": "stratified"})}


if __name__ == "__main__":
    boundary.run(boundary.program(main))
