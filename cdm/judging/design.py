"""The design of a judging: models x prompt sets x measures, as a params file has it (judging/params.yaml).

A model of `rows` and a prompt set of `sets` make a cell: pictures that one model draws of one list, and their figures.
Every key is checked here, without torch and before anything long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdm import limits, measures
from cdm.errors import CdmError
from cdm.params import (
    NUMBER,
    Evaluate,
    Guidance,
    Location,
    Locations,
    MetricModels,
    ParamsError,
    Rate,
    Runtime,
    Samples,
    ScorerProcess,
    Section,
    Seed,
    Steps,
    Text,
    load,
    read_yaml,
    validated,
)
from cdm.system.files import at_home

Precision = Literal["fp32", "bf16", "fp16"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=limits.NAME)]
SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=limits.NAME)]
"""Without a hyphen: the name of a cell is ROW-SET."""
Names = Annotated[list[Name], Field(min_length=1, max_length=limits.LIST)]
Positive = Annotated[float, Field(gt=0, le=limits.WEIGHT), NUMBER]
STEPS = 4
"""Of a model that says nothing else."""


class JudgedModel(Section):
    """A model, and how it draws."""

    title: Text
    """Its name in tables."""
    source: Location | None = None
    """What `cdm sample` takes: a student, a LoRA, an export, a file of weights; or any diffusers folder or hub id of a
    known family. Null: published figures alone; such a model is none of `rows`."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; null means its main branch."""
    steps: Steps | None = None
    """Steps of a picture; null: as many as `sigmas` has, else 4."""
    sigmas: Annotated[list[Rate], Field(min_length=1, max_length=limits.STEPS)] | None = None
    """Noise levels of the steps, before the model's own shift, falling from 1; null: evenly spaced."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance, which doubles the evaluations; 1 is none, as for every student."""
    precision: Precision | None = None
    """Arithmetic; null is that of all models."""
    max_sequence_length: Annotated[int, Field(ge=0, le=limits.TOKENS), NUMBER] | None = None
    """Text tokens of the large encoder; null: as the model was trained, else its family's default."""
    resolution: Annotated[int, Field(ge=1, le=limits.PIXELS), NUMBER] | None = None
    """Height and width of the pictures in pixels; null: as the model was trained, else its own."""
    published: dict[SetName, dict[Text, Annotated[float, NUMBER]]] = Field(default={})
    """Figures that a publication has of it, by prompt set and key of the figure."""

    @model_validator(mode="after")
    def _consistent(self) -> JudgedModel:
        levels = self.sigmas
        if levels is not None and self.steps not in (None, len(levels)):
            raise ValueError(
                f"steps is {self.steps}, but sigmas has {len(levels)} levels: leave one of them out"
            )
        if levels is not None and (levels[0] != 1 or levels != sorted(set(levels), reverse=True)):
            raise ValueError(f"sigmas must fall from 1.0, not {levels}")
        if self.source is None and not self.published:
            raise ValueError("has neither a source nor published figures: give one of them")
        return self

    @property
    def levels(self) -> list[float]:
        """Noise levels of the evaluations, before the model's own shift."""
        if self.sigmas is not None:
            return list(self.sigmas)
        steps = self.steps or STEPS
        return [1 - step / steps for step in range(steps)]


class JudgedSet(Section):
    """A list of prompts, and the measures that are for it."""

    title: Text
    """Its name in tables."""
    files: Annotated[Locations, Field(min_length=1)]
    """Files or folders of prompts, as in `prompts.eval` of a params file."""
    column: Text = "prompt"
    """Column or key that holds the prompt in .jsonl, .csv and .parquet files."""
    count: Annotated[int, Field(ge=1, le=limits.PROMPTS), NUMBER] | None = None
    """The first so many prompts; null is all of them."""
    per_prompt: Samples = 1
    """Pictures of each prompt."""
    metrics: Annotated[list[Text], Field(max_length=limits.LIST)] = Field(default=[])
    """Measures, as in `evaluate.metrics`."""
    scorers: Annotated[list[Text], Field(max_length=limits.LIST)] = Field(default=[])
    """Names of scorers, which `scorers` below has."""
    judge: Location | None = None
    """Folder of a judge, a classifier of the prompts' attributes; null leaves out the measures in its features."""
    real: Location | None = None
    """A safetensors file of real pictures of the prompts; null: distances are to the pictures of `reference`."""
    neighbours: Annotated[int, Field(ge=1, le=limits.NEIGHBOURS), NUMBER] = 3
    """k of the nearest-neighbour radii in precision and recall."""
    resamples: Annotated[int, Field(ge=0, le=limits.SAMPLES), NUMBER] = 200
    """Resamples of the prompts for the intervals; 0 leaves them out."""
    pictures: Samples = 8
    """Prompts whose first picture is shown on the page."""

    @model_validator(mode="after")
    def _consistent(self) -> JudgedSet:
        if not (self.metrics or self.scorers or self.judge):
            raise ValueError("names no measure: give it metrics, scorers or a judge")
        try:
            chosen = measures.chosen(self.metrics)
        except CdmError as error:
            raise ValueError(f"metrics: {error}") from None
        pairs = [measure.name for measure in chosen if measure.kind == "pairs"]
        if pairs and self.per_prompt < 2:
            raise ValueError(
                f"metrics has {pairs[0]}, which compares pictures of one prompt: set per_prompt to 2"
            )
        return self


class JudgingScorer(ScorerProcess):
    """A command in an environment of its own that scores pictures."""

    better: Literal["low", "high"] | None = "high"
    """Which values of its figures are good; null: neither."""


class Agreement(Section):
    """Whether the measuring agrees with a publication on models that everybody can have."""

    models: Names
    """Rows with published figures that are to be met before figures of other rows are believed."""
    tolerance: Annotated[dict[Text, Positive], Field(min_length=1)]
    """The most that a measured figure may be off the published one, by key of the figure."""


class Judging(Section):
    """A whole judging."""

    seed: Seed = 0
    """Seed of the noise: sample k of a set has the same in every row."""
    rows: Names
    """The models that are judged, in the order of the table. All are defined below."""
    sets: Annotated[list[SetName], Field(min_length=1, max_length=limits.LIST)]
    """The prompt sets that they are judged on. All are defined below."""
    reference: Name
    """The row that others are compared with, prompt by prompt; distances are to its pictures where none are real."""
    precision: Precision = "bf16"
    """Arithmetic of models that have none of their own."""
    models: dict[Name, JudgedModel]
    prompts: dict[SetName, JudgedSet]
    metric_models: MetricModels = MetricModels()
    """Models of the measures."""
    scorers: Annotated[list[JudgingScorer], Field(max_length=limits.LIST)] = Field(default=[])
    """Programs that score pictures; a prompt set names those that are for it."""
    agreement: Agreement | None = None
    """Null: nothing is known of any model."""
    runtime: Runtime = Runtime()
    """What changes no result: device, threads, batch_size, accelerate_config, offload_encoders, scorer_minutes."""

    @model_validator(mode="after")
    def _consistent(self) -> Judging:
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._problems_of_names()
        for name, model in self.models.items():
            unknown = sorted(model.published.keys() - self.prompts.keys())
            if unknown:
                yield f"models.{name}.published: no prompt set is called {unknown[0]}"
        yield from self._problems_of_scorers()
        for name in self.agreement.models if self.agreement else []:
            if name not in self.rows:
                yield f"agreement.models: {name} is not in rows: add it"
            elif not self.models[name].published:
                yield f"agreement.models: {name} has no published figures"

    def _problems_of_names(self) -> Iterator[str]:
        tables: list[tuple[str, list[str], str, Mapping[str, Section]]] = [
            ("rows", self.rows, "models", self.models),
            ("sets", self.sets, "prompts", self.prompts),
        ]
        for key, names, table, known in tables:
            if len(set(names)) != len(names):
                yield f"{key} names something twice: {', '.join(names)}"
            yield from (
                f"{key}: {name} is not defined: add it to {table}" for name in names if name not in known
            )
        for name in self.rows:
            if self.models[name].source is None:
                yield f"rows: {name} has no source, so it cannot draw: give it one, or leave it out of rows"
        if self.reference not in self.rows:
            yield f"reference {self.reference} is not in rows: add it"

    def _problems_of_scorers(self) -> Iterator[str]:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) != len(names) or set(names) & measures.MEASURES.keys():
            yield f"scorers: a name is used twice, or is a measure's: {', '.join(names)}"
        for name, each in self.prompts.items():
            unknown = sorted(set(each.scorers) - set(names))
            if unknown:
                yield f"prompts.{name}.scorers: {unknown[0]} is not defined: add it to scorers"

    def cells(self) -> Iterator[tuple[str, str]]:
        """Every (row, set)."""
        for name in self.sets:
            for row in self.rows:
                yield row, name

    def evaluation(self, name: str) -> Evaluate:
        """How the pictures of the prompt set `name` are measured."""
        chosen = self.prompts[name]
        scorers = [scorer for scorer in self.scorers if scorer.name in chosen.scorers]
        return Evaluate(
            judge=chosen.judge,
            real=chosen.real,
            neighbours=chosen.neighbours,
            metrics=chosen.metrics,
            models=self.metric_models,
            scorers=[ScorerProcess(name=each.name, command=each.command) for each in scorers],
            resamples=chosen.resamples,
        )

    def precision_of(self, row: str) -> Precision:
        """The arithmetic of a row."""
        return self.models[row].precision or self.precision


def load_judging(path: str | Path) -> Judging:
    """The judging of a YAML file; raises ParamsError with a line a problem."""
    path = at_home(path)
    try:
        return validated(Judging, read_yaml(path))
    except ParamsError as error:
        lines = str(error).splitlines()
        raise ParamsError(
            "\n".join(each if str(path) in each else f"{path}: {each}" for each in lines)
        ) from None


def sections_of(path: Path | None, metrics: list[str], models: list[str]) -> list[Evaluate]:
    """What is measured by a params file or the file of a judging, or without one by these measures, with NAME=WHERE of
    their models; without both by params.yaml. Raises CdmError."""
    if metrics or models:
        if path is not None:
            raise CdmError("give a file, or --metric and --model, not both")
        named = dict(each.partition("=")[::2] for each in models)
        return [validated(Evaluate, {"metrics": metrics, "models": named})]
    path = at_home(path or "params.yaml")
    values = read_yaml(path)
    if isinstance(values, dict) and "metric_models" in values:
        judging = load_judging(path)
        return [judging.evaluation(name) for name in judging.sets]
    return [load(path).evaluate]
