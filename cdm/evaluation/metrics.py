"""The measures that `evaluate.metrics` and `evaluate.scorers` choose, with intervals over the prompts.

Every sample set is of the same prompts and noise. Distances are to the real pictures, or where there are none to the
teacher's full-length samples, as in cdm.evaluation.quality; unlike there, features are taken as they are, without
dividing by a deviation, because that is how others define these figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm import measures
from cdm.errors import CdmError
from cdm.evaluation.bootstrap import Estimate, Resampling
from cdm.evaluation.feature_sets import FeatureSet
from cdm.evaluation.looks import look_at
from cdm.evaluation.models.base import Crops, FeatureModel, PictureScorer
from cdm.evaluation.samples import RealPictures, Samples, SampleSet
from cdm.evaluation.scorers import ask
from cdm.measures import MODELS, Measure
from cdm.models.metric_models import load_model
from cdm.params import Evaluate, Runtime
from cdm.system.device import choose_device
from cdm.system.progress import track

PICTURES, WORK = 32, 8
"""The most pictures that a model sees at once, and the bytes that each byte of them takes: most models shrink them."""

Place = tuple[str, str]
"""A sample set: model and key, such as ("student", "steps4")."""
Estimates = dict[Place, dict[str, Estimate]]
Bounds = dict[str, dict[str, dict[str, list[float]]]]
"""Lists of numbers by model, sample set and figure."""


@dataclass(frozen=True)
class Chosen:
    """The results of the chosen measures."""

    figures: dict[str, dict[str, dict[str, float]]]
    """By model, sample set and figure."""
    intervals: Bounds = field(repr=False)
    """[low, high]: 95 % over the prompts, where there are enough of them."""
    differences: Bounds = field(repr=False)
    """[difference, low, high] of student sets to the teacher's full-length samples, paired by prompt."""
    replicates: Bounds = field(repr=False)
    """What each figure is in resamples of the prompts, the same ones for every set."""
    sources: list[tuple[str, str]]
    """What measured: a metric, a scorer, and its model."""
    prompts: int
    """Number of prompts, which are what is resampled."""
    steps: tuple[int, int] | None = None
    """Two numbers of steps of the student that are compared, few and more (`compared_steps`); None: there is one."""
    between: dict[str, list[float]] = field(default_factory=dict, repr=False)
    """[difference, low, high] of each figure: the student's with more of these steps less that with few."""


def measure_chosen(
    section: Evaluate, samples: Samples, real: RealPictures | None, cache: Path, *, seed: int, runtime: Runtime
) -> Chosen | None:
    """The chosen measures of every set of `samples`; None where none is chosen.

    Answers of scorers are kept in the folder `cache`. `seed` is that of the resamples; `runtime` has the device of the
    models and the time that a scorer may take. Raises CdmError if a model or a scorer cannot be used.
    """
    if not section.metrics and not section.scorers:
        return None
    chosen = measures.chosen(section.metrics)
    if any(measure.uses_neighbours for measure in chosen):
        _check_neighbours(section, samples, real)
    resampling = Resampling(len(samples.texts), section.resamples, seed)
    bench = _Bench(section, samples, real, resampling, choose_device(runtime.device))
    bench.ask_scorers(cache, runtime.scorer_minutes)
    for (model, of_crops), group in _by_features(chosen).items():
        bench.measure_features(model, group, of_crops=of_crops)
    for measure in chosen:
        if measure.kind == "score":
            bench.measure_score(measure)
    for measure in chosen:
        if measure.kind == "pairs":
            bench.measure_pairs(measure)
    bench.measure_looks([measure for measure in chosen if measure.kind == "look"])
    return bench.result()


def compared_steps(steps: Iterable[int]) -> tuple[int, int] | None:
    """Two numbers of steps, few and more, between which drift is told: 4 and 8 if both are there, else the two most;
    None where there are not two."""
    known = sorted(steps)
    if {4, 8} <= {*known}:
        return 4, 8
    return (known[-2], known[-1]) if len(known) > 1 else None


def _by_features(chosen: Sequence[Measure]) -> dict[tuple[str, bool], list[Measure]]:
    """The measures on features by the model of these, and whether they are of crops: the model sees the pictures once
    for all of them, and their crops."""
    groups: dict[tuple[str, bool], list[Measure]] = {}
    for measure in chosen:
        if measure.kind in ("distance", "variety"):
            groups.setdefault((measure.models[0], measure.of_crops), []).append(measure)
    return groups


def _check_neighbours(section: Evaluate, samples: Samples, real: RealPictures | None) -> None:
    """Raises CdmError where a resample would hold too few pictures for `evaluate.neighbours`."""
    prompts = len(samples.texts)
    if not section.resamples or prompts < measures.FEWEST_PROMPTS:
        return
    fewest = min(samples.per_prompt, int(real.prompt.bincount().min()) if real else samples.per_prompt)
    if section.neighbours >= prompts // 2 * fewest:
        raise CdmError(
            f"evaluate.neighbours {section.neighbours} needs more than the {prompts // 2 * fewest} pictures of half of"
            " the prompts: lower it, or set evaluate.resamples to 0"
        )


class _Bench:
    """Runs one measure after the other over all sample sets, each model loaded for as long as it is needed."""

    def __init__(
        self,
        section: Evaluate,
        samples: Samples,
        real: RealPictures | None,
        resampling: Resampling,
        device: torch.device,
    ) -> None:
        self.section, self.samples, self.real = section, samples, real
        self.resampling, self.device = resampling, device
        self.estimates: Estimates = {(pictures.model, pictures.key): {} for pictures in samples.sets}
        self.sources: list[tuple[str, str]] = []
        self.prompt = torch.arange(len(samples.full.store)) // samples.per_prompt
        self.prompts = [samples.texts[i] for i in self.prompt.tolist()]

    def ask_scorers(self, cache: Path, minutes: float) -> None:
        """First, because they fail most easily; a scorer that fails keeps none of the others from being asked."""
        problems = []
        for scorer in self.section.scorers:
            self.sources.append((scorer.name, scorer.command))
            try:
                for pictures in track(self.samples.sets, scorer.name, unit="set"):
                    answer = ask(scorer, pictures, self.prompts, cache, minutes=minutes)
                    found = {
                        name: self._mean(torch.tensor(values, dtype=torch.float64))
                        for name, values in answer.scores.items()
                    }
                    found |= {name: Estimate(value, torch.empty(0)) for name, value in answer.summary.items()}
                    for name, estimate in found.items():
                        key = scorer.name if name == "score" else f"{scorer.name}_{name}"
                        self._add(pictures, {key: estimate})
            except CdmError as error:
                problems.append(str(error))
        if problems:
            raise CdmError("\n".join(problems))

    def measure_features(self, key: str, group: Sequence[Measure], *, of_crops: bool = False) -> None:
        """The measures of `group`, all on the features of the model `key`, of whole pictures or of crops."""
        model: FeatureModel = self._load(key)
        if of_crops:
            model = Crops(model, self.samples.full.shape)
        self.sources.append((f"{MODELS[key].title}{', crops' * of_crops}", model.description))
        sets, reference = self._features(model)
        for pictures, ours in track(sets, key, unit="set"):
            for measure in group:
                if measure.kind == "variety":
                    self._add(pictures, self._variety(measure, ours))
                elif ours is not reference:
                    self._add(pictures, self._distance(measure, ours, reference))

    def measure_score(self, measure: Measure) -> None:
        """The mean of a score of each picture and its prompt."""
        (quantity,) = measure.quantities
        scorer: PictureScorer = measures.load(measure.compute)(*map(self._load, measure.models))
        self.sources.append((measure.name, scorer.description))
        for pictures in track(self.samples.sets, measure.name, unit="set"):
            prompts = iter(self.prompts)
            parts = [
                scorer(images, [next(prompts) for _ in images]) for images in pictures.batches(PICTURES, WORK)
            ]
            self._add(pictures, {quantity.key: self._mean(torch.cat(parts))})

    def measure_pairs(self, measure: Measure) -> None:
        """The mean over prompts of a value of the pictures of one prompt."""
        (quantity,) = measure.quantities
        compute = measures.load(measure.compute)
        (model,) = map(self._load, measure.models)
        self.sources.append((measure.name, model.description))
        number = self.samples.per_prompt
        for pictures in track(self.samples.sets, measure.name, unit="set"):
            values = [
                compute(model, pictures.pictures(range(start, start + number)))
                for start in range(0, len(self.prompt), number)
            ]
            self._add(pictures, {quantity.key: self.resampling.mean(torch.tensor(values, dtype=torch.float64))})

    def measure_looks(self, group: Sequence[Measure]) -> None:
        """The mean of what each picture is by itself, for all measures of `group`, which see the pictures once."""
        if not group:
            return
        names = [measure.name for measure in group]
        keys = [quantity.key for measure in group for quantity in measure.quantities]
        place = self.device if self.device.type == "cuda" else torch.device("cpu")  # in double precision
        for pictures in track(self.samples.sets, "looks", unit="set"):
            parts = [look_at(names, images.to(place)).cpu() for images in pictures.batches(PICTURES, WORK)]
            columns = torch.cat(parts).T
            self._add(pictures, {key: self._mean(column) for key, column in zip(keys, columns, strict=True)})

    def _between(self, steps: tuple[int, int] | None) -> dict[str, list[float]]:
        """Differences of the student with more steps to the student with few, paired by prompt."""
        if steps is None:
            return {}
        few, more = (self.estimates["student", f"steps{count}"] for count in steps)
        differences = {name: estimate.minus(few[name]) for name, estimate in more.items()}
        return {name: _bounded(difference) for name, difference in differences.items()}

    def result(self) -> Chosen:
        figures: dict[str, dict[str, dict[str, float]]] = {}
        intervals: Bounds = {}
        differences: Bounds = {}
        replicates: Bounds = {}
        full = self.estimates.get((self.samples.full.model, self.samples.full.key), {})
        for (model, key), row in self.estimates.items():
            figures.setdefault(model, {})[key] = {
                name: _digits(estimate.value) for name, estimate in row.items()
            }
            bounds = {name: _listed(estimate.interval) for name, estimate in row.items() if estimate.interval}
            if bounds:
                intervals.setdefault(model, {})[key] = bounds
                replicates.setdefault(model, {})[key] = {
                    name: _listed(row[name].replicates.tolist()) for name in bounds
                }
            if model == "student":
                paired = {name: estimate.minus(full[name]) for name, estimate in row.items() if name in full}
                differences.setdefault(model, {})[key] = {
                    name: _bounded(estimate) for name, estimate in paired.items()
                }
        steps = compared_steps(each.steps for each in self.samples.student)
        return Chosen(
            figures,
            intervals,
            differences,
            replicates,
            self.sources,
            len(self.samples.texts),
            steps,
            self._between(steps),
        )

    def _load(self, key: str) -> Any:
        return load_model(key, self.section.models, self.device)

    def _add(self, pictures: SampleSet, found: Mapping[str, Estimate]) -> None:
        row = self.estimates[pictures.model, pictures.key]
        for name, estimate in found.items():
            if name in row:
                raise CdmError(f"evaluate.scorers: two figures are called {name}: rename a scorer")
            row[name] = estimate

    def _mean(self, scores: Tensor) -> Estimate:
        """Of a score of each picture: (pictures,)."""
        return self.resampling.mean(scores.unflatten(0, (-1, self.samples.per_prompt)).mean(1))

    def _variety(self, measure: Measure, ours: FeatureSet) -> dict[str, Estimate]:
        """Of all pictures, and of those of one prompt, averaged over the prompts."""
        compute: Callable[[Tensor], float] = measures.load(measure.compute)
        whole, in_prompt = (quantity.key for quantity in measure.quantities)
        found = self.resampling.of_sets(lambda prompts: {whole: compute(ours.of_prompts(prompts).features)})
        if self.samples.per_prompt > 1:
            within = [compute(features) for features in ours.features.split(self.samples.per_prompt)]
            found[in_prompt] = self.resampling.mean(torch.tensor(within, dtype=torch.float64))
        return found

    def _distance(self, measure: Measure, ours: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
        compute: Callable[[FeatureSet, FeatureSet, int], Sequence[float]] = measures.load(measure.compute)
        names = [quantity.key for quantity in measure.quantities]

        def values(prompts: Tensor | None) -> dict[str, float]:
            found = compute(ours.of_prompts(prompts), reference.of_prompts(prompts), self.section.neighbours)
            return dict(zip(names, found, strict=True))

        return self.resampling.of_sets(values)

    def _features(self, model: FeatureModel) -> tuple[list[tuple[SampleSet, FeatureSet]], FeatureSet]:
        """Features of all sample sets, and those of the reference, which may be one of them."""
        samples = self.samples
        found = [
            (pictures, FeatureSet(self._extract(model, pictures), self.prompt))
            for pictures in track(samples.sets if self.real else samples.needed, "features", unit="set")
        ]
        if self.real is not None:
            return found, FeatureSet(self._extract(model, self.real), self.real.prompt)
        reference = next(features for pictures, features in found if pictures is samples.full)
        return found[: len(samples.sets)], reference

    def _extract(self, model: FeatureModel, pictures: SampleSet | RealPictures) -> Tensor:
        """Distances are computed where double precision is fast: on a CUDA device, or on the CPU."""
        features = torch.cat([model(images) for images in pictures.batches(PICTURES, WORK)])
        return features.to(self.device if self.device.type == "cuda" else "cpu")


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _bounded(difference: Estimate) -> list[float]:
    """A difference, and the ends of its interval where one is known."""
    return _listed((difference.value, *(difference.interval or ())))


def _listed(values: Iterable[float]) -> list[float]:
    return [_digits(value) for value in values]
