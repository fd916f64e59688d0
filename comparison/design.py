"""The design of the comparison: methods as settings of one training step, at matched guidance and equal updates or
cost.

Everything that makes two rows comparable is here, as pure functions of `comparison/params.yaml`, the repository's
parameters and the recipes. `cells` puts it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cdm.data.sampling import evaluations
from cdm.errors import CdmError
from cdm.params import Params, Power, Section, Seed, StepsList, changed, load, parse, read_yaml
from cdm.planning.forwards import first_share, forwards_of_round

PARAMS = Path("comparison/params.yaml")
CELLS = Path("comparison/cells")
RECIPES = Path("recipes")

Table = Literal["updates", "cost", "ablations"]
TABLES: tuple[Table, ...] = ("updates", "cost", "ablations")
FROM_RECIPE = ("schedule", "distill")
"""Sections that a method takes from its recipe; the others are the repository's, whose data all cells share."""


class Method(Section):
    """A distillation method, or an ablation: parameters of the training step."""

    title: str
    """Its name in tables and figures."""
    recipe: str | None = None
    """NAME of recipes/NAME.yaml, from which `schedule` and `distill` are taken; null is params.yaml."""
    set: dict[str, Any] = Field(default={})
    """Changes to that, by dotted key, as in `dvc exp run -S`."""
    guidance: Literal["matched", "own"] = "matched"
    """matched: the strength of guidance is the reference's (see `guidance_strength`); own: as the settings have it."""
    steps: StepsList | None = None
    """Numbers of steps that it is measured at, of those of the comparison; null is all."""
    updates: Annotated[Power, Field(gt=0)] = 1.0
    """Student updates in multiples of the reference's (not in the table of equal cost)."""


class Comparison(Section):
    """A whole comparison/params.yaml."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Seeds of the trainings; the samples are drawn from the same noise for all."""
    steps: Annotated[StepsList, Field(min_length=1)]
    """Numbers of steps at which students and teacher are measured."""
    reference: str
    """The method whose updates, cost and guidance the others get, and whose row theirs are compared with."""
    updates: list[str]
    """Methods compared at equal numbers of student updates."""
    cost: list[str]
    """Methods compared at equal cost in forward-equivalents; the reference itself is taken from `updates`."""
    ablations: list[str]
    """Variants of the reference, at equal numbers of student updates."""
    methods: dict[str, Method]

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        for table in TABLES:
            names: list[str] = getattr(self, table)
            if len(set(names)) != len(names):
                raise ValueError(f"{table} names a method twice: {names}")
            for name in names:
                if name not in self.methods:
                    raise ValueError(f"{table}: {name} is not defined: add it to methods")
            if table != "updates" and self.reference in names:
                raise ValueError(f"{table} names the reference {self.reference}: its row comes from updates")
        if self.reference not in self.updates:
            raise ValueError(f"reference {self.reference} is not in updates: add it")
        return self

    def rows(self, table: Table) -> list[tuple[Table, str]]:
        """Where the rows of a table come from, as (table, method): the reference's cells are those of `updates`."""
        rows: list[tuple[Table, str]] = [(table, name) for name in getattr(self, table)]
        return rows if table == "updates" else [("updates", self.reference), *rows]


def load_comparison(path: Path = PARAMS) -> Comparison:
    """The comparison of a YAML file; CdmError with a line a problem."""
    try:
        return Comparison.model_validate(read_yaml(path))
    except ValidationError as error:
        raise CdmError("\n".join(_problem(path, each) for each in error.errors())) from None


def _problem(path: Path, problem: Any) -> str:
    key = ".".join(map(str, problem["loc"])) or "the file"
    return f"{path}: {key}: {problem['msg'].removeprefix('Value error, ')}"


# Settings.


def own_settings(method: Method, base: Params, recipes: Path = RECIPES) -> Params:
    """The parameters of a method as its recipe and changes have them, on the data of `base`. Raises CdmError."""
    values = base.model_dump(mode="json")
    if method.recipe is not None:
        recipe = load(recipes / f"{method.recipe}.yaml").model_dump(mode="json")
        values |= {section: recipe[section] for section in FROM_RECIPE}
        values["latents"]["train_pairs"] = recipe["latents"]["train_pairs"]
    return parse(changed(values, method.set))


# Guidance.


def guidance_strength(params: Params, shift: float) -> float | None:
    """How strongly a student is guided: it behaves like the teacher at guidance 1 + strength.

    That is where the weighted directions of the terms cancel. A term that matches the teacher draws with unit strength
    in x0 towards it at the term's guidance_scale, CA away from the unconditional prediction with its `scale` (where it
    fades, on average over the anchors), so strength = (w_ca scale + sum of w (guidance_scale - 1)) / sum of w. A term
    without guidance, such as CDM's, dilutes it. DMD's regression is left out: its pairs have the guidance of `teacher`.
    None where there is nothing to match: no guidance, or nothing that CA is weighed against.
    """
    losses = params.distill.losses
    pulls = {name: weight for name, weight in losses.weights.items() if name in losses.guided}
    guided = losses.ca.weight * losses.ca.scale * mean_fade(params, shift)
    guided += sum(weight * (getattr(losses, name).guidance_scale - 1) for name, weight in pulls.items())
    return guided / sum(pulls.values()) if guided and pulls else None


def mean_fade(params: Params, shift: float, points: int = 1000) -> float:
    """Mean over the anchors of what CA's scale is multiplied with: the anchor's level to the power `fade`."""
    schedule, power = params.schedule, params.distill.losses.ca.fade

    def mean(levels: Sequence[float]) -> float:
        return fmean((shift * level / (1 + (shift - 1) * level)) ** power for level in levels)

    if schedule.kind == "fixed":
        return mean(schedule.sigmas)
    span = schedule.sigma_max - schedule.sigma_min
    inner = mean([schedule.sigma_min + span * (i + 0.5) / points for i in range(points)])
    return first_share(schedule) + (1 - first_share(schedule)) * inner


def with_guidance(params: Params, strength: float, shift: float) -> Params:
    """`params` with all their guidance in proportion, so that it has this strength. CdmError where there is none."""
    present = guidance_strength(params, shift)
    if present is None:
        raise CdmError("its guidance cannot be matched, because it has none: set guidance to own")
    losses, factor = params.distill.losses, strength / present
    scales = {"ca.scale": losses.ca.scale * factor}
    for name in losses.guided:
        scales[f"{name}.guidance_scale"] = 1 + (getattr(losses, name).guidance_scale - 1) * factor
    changes = {f"distill.losses.{key}": float(f"{scale:.6g}") for key, scale in scales.items()}
    return parse(changed(params.model_dump(mode="json"), changes))


# Length.


def student_updates(params: Params) -> int:
    """Updates of the student in a training."""
    return (params.distill.iterations - params.distill.fake_only) // params.distill.student_every


def with_updates(params: Params, updates: int) -> Params:
    """`params` with as many iterations as make so many student updates."""
    iterations = params.distill.fake_only + updates * params.distill.student_every
    return parse(changed(params.model_dump(mode="json"), {"distill.iterations": iterations}))


def forward_equivalents(params: Params, shift: float) -> float:
    """Cost of a training: forwards of one sample, a forward with its backward counting 3; with a regression's pairs."""
    before, a_round = _costs(params, shift)
    return before + student_updates(params) * a_round


def with_cost(params: Params, cost: float, shift: float) -> Params:
    """`params` with the number of iterations whose cost is nearest to `cost`. CdmError if there is none."""
    before, a_round = _costs(params, shift)
    updates = round((cost - before) / a_round)
    if updates < 1:
        raise CdmError(
            f"costs {before + a_round:.3g} with one student update, more than the reference's {cost:.3g}"
        )
    return with_updates(params, updates)


def _costs(params: Params, shift: float) -> tuple[float, float]:
    """Cost of what comes before the student's first update, and of a round that updates it."""
    distill, schedule = params.distill, params.schedule
    alone, both = (
        distill.batch_size * forwards_of_round(distill, schedule, shift, learns=learns).equivalents
        for learns in (False, True)
    )
    pairs = 0
    if distill.losses.regression.weight:
        pairs = params.latents.train_pairs * evaluations(params.latents.steps, params.teacher.guidance_scale)
    return pairs + distill.fake_only // distill.student_every * alone, both


# All of it.


def cells(
    comparison: Comparison, base: Params, shift: float, recipes: Path = RECIPES
) -> Iterator[tuple[Table, str, Params]]:
    """The parameters of every cell, as (table, method, parameters); they are the same for all seeds.

    `shift` is the teacher's. Raises CdmError, naming the method.
    """
    reference = own_settings(comparison.methods[comparison.reference], base, recipes)
    strength = guidance_strength(reference, shift)
    updates, cost = student_updates(reference), forward_equivalents(reference, shift)
    for table in TABLES:
        for name in getattr(comparison, table):
            method = comparison.methods[name]
            try:
                params = own_settings(method, base, recipes)
                if name != comparison.reference and method.guidance == "matched" and strength is not None:
                    params = with_guidance(params, strength, shift)
                if table == "cost":
                    params = with_cost(params, cost, shift)
                else:
                    params = with_updates(params, max(round(updates * method.updates), 1))
                wanted = comparison.steps if method.steps is None else method.steps
                params = measured_at(params, [steps for steps in comparison.steps if steps in wanted])
            except CdmError as error:
                raise CdmError(
                    "\n".join(f"methods.{name}: {line}" for line in str(error).splitlines())
                ) from None
            yield table, name, params


def measured_at(params: Params, steps: list[int], teacher_steps: list[int] | None = None) -> Params:
    """`params` that draw a student at `steps`, the guided teacher at `teacher_steps`, and no pictures to look at."""
    sample = {"sample.steps": steps, "sample.teacher_steps": teacher_steps or [], "sample.pictures": 1}
    return parse(changed(params.model_dump(mode="json"), sample))


def with_pairs(params: Params, count: int) -> Params:
    """`params` that draw so many pairs for a regression."""
    return parse(changed(params.model_dump(mode="json"), {"latents.train_pairs": count}))
