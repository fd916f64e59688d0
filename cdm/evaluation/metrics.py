"""The measures that `evaluate.metrics` and `evaluate.scorers` choose, with intervals over the prompts.

Every sample set is of the same prompts and noise. Distances are to the real pictures, or where there are none to the
teacher's full-length samples, as in cdm.evaluation.quality; unlike there, features are taken as they are, without
dividing by a deviation, because that is how others define these figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cdm.errors import CdmError
from cdm.evaluation import distances
from cdm.evaluation.bootstrap import FEWEST, Estimate, Resampling
from cdm.evaluation.models import clip
from cdm.evaluation.models.base import FeatureModel, PictureScorer
from cdm.evaluation.models.clip import Clip
from cdm.evaluation.models.dinov2 import Dinov2Features
from cdm.evaluation.models.inception import InceptionFeatures
from cdm.evaluation.models.lpips import Lpips
from cdm.evaluation.samples import RealPictures, Samples, SampleSet
from cdm.evaluation.scorers import ask
from cdm.models.hub import resolved_revision
from cdm.params import Evaluate, Metric, MetricModels, Params
from cdm.preflight import local_model
from cdm.system.device import choose_device
from cdm.system.progress import track

PICTURES = 32
"""Pictures that a model sees at once."""
EXTRACTORS = {"inception": "InceptionV3", "dinov2": "DINOv2", "clip": "CLIP"}
SCORES = ("clip_score", "pick_score", "hps", "aesthetic")

Place = tuple[str, str]
"""A sample set: model and key, such as ("student", "steps4")."""
Estimates = dict[Place, dict[str, Estimate]]
Bounds = dict[str, dict[str, dict[str, list[float]]]]
"""Lists of numbers by model, sample set and figure."""


@dataclass(frozen=True)
class Chosen:
    """What the chosen measures found."""

    figures: dict[str, dict[str, dict[str, float]]]
    """By model, sample set and figure."""
    intervals: Bounds = field(repr=False)
    """[low, high]: 95 % over the prompts, where there are enough of them."""
    differences: Bounds = field(repr=False)
    """[difference, low, high] of student sets to the teacher's full-length samples, paired by prompt."""
    sources: list[tuple[str, str]]
    """What measured: a metric, a scorer, and its model."""
    prompts: int
    """Number of prompts, which are what is resampled."""


def measure_chosen(params: Params, samples: Samples, real: RealPictures | None, cache: Path) -> Chosen | None:
    """The chosen measures of every set of `samples`; None where none is chosen.

    Answers of scorers are kept in the folder `cache`. Raises CdmError if a model or a scorer cannot be used.
    """
    section = params.evaluate
    if not section.metrics and not section.scorers:
        return None
    _check_neighbours(section, samples, real)
    device = choose_device(params.runtime.device)
    resampling = Resampling(len(samples.texts), section.resamples, params.seed)
    bench = _Bench(section, samples, real, resampling, device)
    bench.ask_scorers(cache)
    for extractor, kinds in _by_extractor(section.metrics).items():
        bench.measure_features(extractor, kinds)
    for metric in section.metrics:
        if metric in SCORES:
            bench.measure_score(metric)
    if "lpips" in section.metrics:
        bench.measure_lpips()
    return bench.result()


def _by_extractor(metrics: Sequence[Metric]) -> dict[str, list[str]]:
    """What is measured on the features of each extractor: {"dinov2": ["frechet", "prdc"], "clip": ["cmmd"]}."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        kind, _, extractor = ("cmmd", "", "clip") if metric == "cmmd" else metric.partition("_")
        if extractor in EXTRACTORS:
            found.setdefault(extractor, []).append(kind)
    return found


def _check_neighbours(section: Evaluate, samples: Samples, real: RealPictures | None) -> None:
    """Raises CdmError where a resample would hold too few pictures for `evaluate.neighbours`."""
    wanted = any(metric.startswith("prdc") for metric in section.metrics)
    prompts = len(samples.texts)
    if not wanted or not section.resamples or prompts < FEWEST:
        return
    fewest = min(samples.per_prompt, int(real.prompt.bincount().min()) if real else samples.per_prompt)
    if section.neighbours >= prompts // 2 * fewest:
        raise CdmError(
            f"evaluate.neighbours {section.neighbours} needs more than the {prompts // 2 * fewest} pictures of half of"
            " the prompts: lower it, or set evaluate.resamples to 0"
        )


@dataclass(frozen=True)
class _Set:
    """Features of a set of pictures, and the prompt of each."""

    features: Tensor
    prompt: Tensor

    def of(self, prompts: Tensor | None) -> _Set:
        """The pictures of some prompts, or all."""
        if prompts is None:
            return self
        rows = torch.isin(self.prompt, prompts)
        return _Set(self.features[rows.to(self.features.device)], self.prompt[rows])

    @property
    def groups(self) -> Tensor | None:
        """The prompts, if each has several pictures here: a single one makes no pair."""
        counts = self.prompt.bincount()
        return self.prompt if int(counts[counts > 0].min()) > 1 else None


def _frechet(ours: _Set, theirs: _Set, _neighbours: int) -> dict[str, float]:
    return {"frechet": distances.frechet_distance(ours.features, theirs.features)}


def _kernel(ours: _Set, theirs: _Set, _neighbours: int) -> dict[str, float]:
    groups = (ours.groups, theirs.groups)
    given = groups if all(each is not None for each in groups) else ()
    return {"kernel": distances.kernel_distance(ours.features, theirs.features, *given)}


def _prdc(ours: _Set, theirs: _Set, neighbours: int) -> dict[str, float]:
    return distances.manifold(theirs.features, ours.features, neighbours)._asdict()


def _cmmd(ours: _Set, theirs: _Set, _neighbours: int) -> dict[str, float]:
    return {"cmmd": distances.cmmd(ours.features, theirs.features)}


Measure = Callable[[_Set, _Set, int], Mapping[str, float]]
AGAINST: dict[str, Measure] = {"frechet": _frechet, "kernel": _kernel, "prdc": _prdc, "cmmd": _cmmd}
"""Measures of a set against the reference."""


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
        self.estimates: Estimates = {(each.model, each.key): {} for each in samples.sets}
        self.sources: list[tuple[str, str]] = []
        self.prompt = torch.arange(len(samples.full.store)) // samples.per_prompt
        self.prompts = [samples.texts[i] for i in self.prompt.tolist()]

    def ask_scorers(self, cache: Path) -> None:
        """First, because they fail most easily; a scorer that fails keeps none of the others from being asked."""
        problems = []
        for scorer in self.section.scorers:
            self.sources.append((scorer.name, scorer.command))
            try:
                for each in track(self.samples.sets, scorer.name, unit="set"):
                    answer = ask(scorer, each, self.prompts, cache)
                    found = {
                        name: self._mean(torch.tensor(values, dtype=torch.float64))
                        for name, values in answer.scores.items()
                    }
                    found |= {name: Estimate(value, torch.empty(0)) for name, value in answer.summary.items()}
                    for name, estimate in found.items():
                        key = scorer.name if name == "score" else f"{scorer.name}_{name}"
                        self._add(each, {key: estimate})
            except CdmError as error:
                problems.append(str(error))
        if problems:
            raise CdmError("\n".join(problems))

    def measure_features(self, extractor: str, kinds: Sequence[str]) -> None:
        """Measures of `kinds` on one extractor's features; those of CLIP are named without it."""
        model = load_features(extractor, self.section.models, self.device)
        self.sources.append((EXTRACTORS[extractor], model.description))
        suffix = "" if extractor == "clip" else f"_{extractor}"
        sets, reference = self._features(model)
        for each, ours in track(sets, extractor, unit="set"):
            for kind in kinds:
                if kind == "vendi":
                    self._add(each, self._vendi(ours), suffix)
                elif ours is not reference:
                    self._add(each, self._against(AGAINST[kind], ours, reference), suffix)

    def measure_score(self, metric: str) -> None:
        scorer = load_scorer(metric, self.section.models, self.device)
        self.sources.append((metric, scorer.description))
        for each in track(self.samples.sets, metric, unit="set"):
            prompts = iter(self.prompts)
            parts = [scorer(images, [next(prompts) for _ in images]) for images in _in_parts(each.batches())]
            self._add(each, {metric: self._mean(torch.cat(parts))})

    def measure_lpips(self) -> None:
        model = Lpips(_place(self.section.models, "lpips"), self.device)
        self.sources.append(("lpips", model.description))
        number = self.samples.per_prompt
        for each in track(self.samples.sets, "lpips", unit="set"):
            values = [
                model.mean_distance(each.pictures(range(start, start + number)))
                for start in range(0, len(self.prompt), number)
            ]
            estimate = self.resampling.mean(torch.tensor(values, dtype=torch.float64))
            self._add(each, {"lpips_diversity": estimate})

    def result(self) -> Chosen:
        figures: dict[str, dict[str, dict[str, float]]] = {}
        intervals: Bounds = {}
        differences: Bounds = {}
        full = self.estimates[self.samples.full.model, self.samples.full.key]
        for (model, key), row in self.estimates.items():
            figures.setdefault(model, {})[key] = {name: _digits(each.value) for name, each in row.items()}
            bounds = {name: _listed(each.interval) for name, each in row.items() if each.interval}
            if bounds:
                intervals.setdefault(model, {})[key] = bounds
            if model == "student":
                paired = {name: each.minus(full[name]) for name, each in row.items() if name in full}
                differences.setdefault(model, {})[key] = {
                    name: _listed((each.value, *(each.interval or ()))) for name, each in paired.items()
                }
        return Chosen(figures, intervals, differences, self.sources, len(self.samples.texts))

    def _add(self, each: SampleSet, found: Mapping[str, Estimate], suffix: str = "") -> None:
        row = self.estimates[each.model, each.key]
        for name, estimate in found.items():
            if name + suffix in row:
                raise CdmError(f"evaluate.scorers: two figures are called {name + suffix}: rename a scorer")
            row[name + suffix] = estimate

    def _mean(self, scores: Tensor) -> Estimate:
        """Of a score of each picture: (pictures,)."""
        return self.resampling.mean(scores.unflatten(0, (-1, self.samples.per_prompt)).mean(1))

    def _vendi(self, ours: _Set) -> dict[str, Estimate]:
        """Of all pictures, and of those of one prompt, averaged over the prompts."""
        found = self.resampling.of_sets(lambda prompts: {"vendi": distances.vendi(ours.of(prompts).features)})
        if self.samples.per_prompt > 1:
            of_prompts = ours.features.split(self.samples.per_prompt)
            within = torch.tensor([distances.vendi(each) for each in of_prompts], dtype=torch.float64)
            found["vendi_in_prompt"] = self.resampling.mean(within)
        return found

    def _against(self, measure: Measure, ours: _Set, reference: _Set) -> dict[str, Estimate]:
        return self.resampling.of_sets(
            lambda prompts: measure(ours.of(prompts), reference.of(prompts), self.section.neighbours)
        )

    def _features(self, model: FeatureModel) -> tuple[list[tuple[SampleSet, _Set]], _Set]:
        """Features of all sample sets, and those of the reference, which may be one of them."""
        sets = [
            (each, _Set(self._extract(model, each.batches()), self.prompt))
            for each in track(self.samples.sets, "features", unit="set")
        ]
        if self.real is not None:
            return sets, _Set(self._extract(model, self.real.batches()), self.real.prompt)
        return sets, next(features for each, features in sets if each is self.samples.full)

    def _extract(self, model: FeatureModel, batches: Iterable[Tensor]) -> Tensor:
        """Distances are computed where double precision is fast: on a CUDA device, or on the CPU."""
        features = torch.cat([model(images) for images in _in_parts(batches)])
        return features.to(self.device if self.device.type == "cuda" else "cpu")


def _in_parts(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(PICTURES)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _listed(values: Iterable[float]) -> list[float]:
    return [_digits(value) for value in values]


def _place(models: MetricModels, key: str) -> Path:
    """The file or folder of a model. Raises CdmError: it was there when the stage began."""
    source: str | None = getattr(models, key)
    found = None if source is None else local_model(source)
    if found is None:
        raise CdmError(f"evaluate.models.{key}: {source}: not here: see docs/evaluation.md")
    return found


def _name(models: MetricModels, key: str) -> str:
    """What a model is called in the report: what the parameters say, and the commit of a hub's model."""
    source, revision = getattr(models, key), resolved_revision(_place(models, key))
    return f"{source} at {revision}" if revision and revision not in source else str(source)


def load_features(extractor: str, models: MetricModels, device: torch.device) -> FeatureModel:
    """The feature model that `evaluate.models` names as inception, dinov2 or clip. Raises CdmError."""
    place = _place(models, extractor)
    match extractor:
        case "inception":
            return InceptionFeatures(place, device)
        case "dinov2":
            return Dinov2Features(place, device, _name(models, extractor))
        case _:
            return clip.ClipFeatures(Clip(place, device), _name(models, extractor))


def load_scorer(metric: str, models: MetricModels, device: torch.device) -> PictureScorer:
    """The scorer of one of `SCORES`. Raises CdmError."""
    key = "clip" if metric in ("clip_score", "aesthetic") else metric
    loaded, name = Clip(_place(models, key), device), _name(models, key)
    if metric == "aesthetic":
        return clip.Aesthetic(loaded, _place(models, "aesthetic"), name)
    make: dict[str, Callable[[Clip, str], PictureScorer]] = {
        "clip_score": clip.clip_score,
        "pick_score": clip.pick_score,
        "hps": clip.hps,
    }
    return make[metric](loaded, name)
