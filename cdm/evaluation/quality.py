"""The figures of metrics/quality.json: every sample set against the real pictures and against the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdm.errors import CdmError
from cdm.evaluation import distances
from cdm.evaluation.bootstrap import Estimate, jackknife
from cdm.evaluation.features import Extractor, Features, all_right, attribute_targets, attributes_right, extract
from cdm.evaluation.samples import RealPictures, Samples, SampleSet
from cdm.measures import Quantity, basics, headlines, most_neighbours, student_t
from cdm.randomness import philox
from cdm.system.progress import track

HALVINGS = 8
"""Random halvings of the reference set over which its own row is averaged."""

Row = dict[str, float]
Table = dict[str, dict[str, Row]]
"""Rows by model (student, teacher; real) and by name (steps4; halves)."""
Replicates = dict[str, dict[str, dict[str, list[float]]]]
"""Replicates of figures (`cdm.evaluation.bootstrap.Estimate`) by model, sample set and figure."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured; `quality` is what metrics/quality.json holds."""

    quality: Table
    errors: Table = field(repr=False)
    """Standard errors of the two distances to the reference and of the accuracy, over the samples' noise."""
    replicates: Replicates = field(repr=False)
    """What has those errors for its deviation: a number for the noise of the same samples in every set, so that the
    error of a difference of two sets is the deviation of the differences."""
    attributes: Table = field(repr=False)
    """Accuracy of each attribute on its own."""
    floor: Row
    """What frechet_distance and style_distance of that many perfect samples would be on average; empty where the
    reference is the teacher, with whom the samples share their noise."""
    reference: str
    """`real` or `teacher`: what the distances are to."""
    reference_count: int
    features: str
    """What the features are."""
    judged: bool
    """Whether they are a judge's; else pixel statistics."""

    @property
    def reaches(self) -> Table:
        """Half of the 95 % interval of what has an error, over the samples' noise."""
        return {
            model: {
                key: {
                    name: student_t(len(self.replicates[model][key][name]) - 1) * error
                    for name, error in row.items()
                }
                for key, row in rows.items()
            }
            for model, rows in self.errors.items()
        }

    @property
    def basics(self) -> dict[str, Quantity]:
        """What the figures are called, by key."""
        return basics(self.judged)

    @property
    def headlines(self) -> list[Quantity]:
        """The main ones."""
        return headlines(self.judged)


@dataclass(frozen=True)
class _Measured:
    """Features of one set, the prompt of each picture, and which attributes are right."""

    features: Features
    prompt: Tensor
    right: dict[str, Tensor]

    @property
    def count(self) -> int:
        return len(self.prompt)

    def rows(self, indices: Tensor) -> _Measured:
        right = {name: values[indices] for name, values in self.right.items()}
        return _Measured(self.features.rows(indices), self.prompt[indices], right)


class _Reference:
    """A set that others are measured against, and the Gaussians of its features."""

    def __init__(self, measured: _Measured) -> None:
        self.set = measured
        self.content = distances.fit_gaussian(measured.features.content)
        self.style = distances.fit_gaussian(measured.features.style)


def evaluate(
    samples: Samples, real: RealPictures | None, extractor: Extractor, *, neighbours: int, seed: int
) -> Evaluation:
    """Measure all sets of `samples`.

    Distances are to `real`, or where that is None to the teacher's full-length samples. A row holds:

    evaluations         of the transformer for one picture
    frechet_distance    of the content features to the reference, each divided by the reference's deviation
    style_distance      the same of the style features
    kernel_distance     unbiased kernel distance of the content features (0 on average for perfect samples)
    attribute_accuracy  share of pictures with every attribute that the prompt names (if the extractor knows any)
    precision, recall, density, coverage   of the content features; k is `neighbours`
    diversity           mean distance of two pictures of one prompt, content features
    frechet_to_teacher, style_to_teacher   to the teacher's full-length samples (not for those themselves)
    count               pictures

    `real.halves` says what perfect samples would score: the real pictures split at random into two halves (as
    equal as can be for each prompt), one measured against the other, averaged over 8 splits. Its distances are
    those of smaller sets, hence larger than perfect samples would get: `Evaluation.floor` has them at the
    samples' count. `seed` is that of the splits. Figures are rounded to 6 significant digits; cdm.measures
    has their titles. Raises CdmError.
    """
    measure = _measurer(samples, real, extractor)
    raw = {
        (pictures.model, pictures.key): measure(pictures)
        for pictures in track(samples.needed, "features", unit="set")
    }
    full = raw[samples.full.model, samples.full.key]
    target = full if real is None else measure(real)
    if neighbours > most_neighbours(full.count, target.count):
        raise CdmError(
            f"evaluate.neighbours {neighbours} needs more than {full.count} samples and"
            f" {target.count} reference pictures: lower it, or raise latents.per_prompt"
        )
    scale = _scaler(target.features)
    reference, teacher = _Reference(scale(target)), _Reference(scale(full))
    quality: Table = {"student": {}, "teacher": {}}
    errors: Table = {"student": {}, "teacher": {}}
    replicates: Replicates = {"student": {}, "teacher": {}}
    attributes: Table = {"student": {}, "teacher": {}}
    for pictures in track(samples.sets, "distances", unit="set"):
        model, key = pictures.model, pictures.key
        measured = scale(raw[model, key])
        row: Row = {"evaluations": pictures.evaluations}
        if pictures is samples.full and real is None:
            row |= {"frechet_distance": 0.0, "style_distance": 0.0}
        else:
            row |= _against(measured, reference, neighbours)
        row |= _within(measured)
        if pictures is not samples.full:
            row |= _rename(_frechet(measured, teacher), "frechet_to_teacher", "style_to_teacher")
        quality[model][key] = _rounded({**row, "count": measured.count})
        known = _over_noise(measured, reference, samples.per_prompt)
        errors[model][key] = {
            name: _digits(each.error) for name, each in known.items() if each.error is not None
        }
        replicates[model][key] = {
            name: [_digits(value) for value in each.replicates.tolist()] for name, each in known.items()
        }
        attributes[model][key] = _per_attribute(measured)
    floor: Row = {}
    if real is not None:
        halves = _halves(reference.set, neighbours, seed)
        quality["real"] = {"halves": _rounded({"evaluations": 0, **halves})}
        attributes["real"] = {"halves": _per_attribute(reference.set)}
        floor = {
            name: expected_at(halves[name], reference.set.count // 2, full.count, reference.set.count)
            for name in ("frechet_distance", "style_distance")
        }
    return Evaluation(
        quality,
        errors,
        replicates,
        attributes,
        _rounded(floor),
        reference="teacher" if real is None else "real",
        reference_count=target.count,
        features=extractor.description,
        judged=bool(extractor.attributes),
    )


def expected_at(distance: float, half: int, count: int, reference_count: int) -> float:
    """Fréchet distance of `count` samples to `reference_count` of the same distribution, from that of two halves.

    Both of its terms are quadratic in sampling errors, whose variances go as 1/n: so it goes as 1/n + 1/m.
    """
    return distance * (1 / count + 1 / reference_count) / (2 / half)


def _measurer(
    samples: Samples, real: RealPictures | None, extractor: Extractor
) -> Callable[[SampleSet | RealPictures], _Measured]:
    targets = attribute_targets(samples.texts, extractor.attributes)
    targets = {name: target for name, target in targets.items() if (target >= 0).any()}
    shape = samples.full.shape
    if real is not None and real.shape != shape:
        raise CdmError(
            f"evaluate.real: pictures of {real.shape}, but the samples are {shape}: resize the real pictures"
        )

    def measure(pictures: SampleSet | RealPictures) -> _Measured:
        features = extract(extractor, pictures.batches())
        if isinstance(pictures, RealPictures):
            prompt = pictures.prompt
        else:
            prompt = torch.arange(len(features.content)) // samples.per_prompt
        right = attributes_right(features.logits, {name: target[prompt] for name, target in targets.items()})
        return _Measured(features, prompt, right)

    return measure


def _scaler(reference: Features) -> Callable[[_Measured], _Measured]:
    """Divides features by their deviation over the reference."""
    content, style = distances.deviation(reference.content), distances.deviation(reference.style)

    def scale(measured: _Measured) -> _Measured:
        features = Features(
            measured.features.content / content, measured.features.style / style, measured.features.logits
        )
        return _Measured(features, measured.prompt, measured.right)

    return scale


def _frechet(measured: _Measured, reference: _Reference) -> Row:
    content, style = (
        distances.fit_gaussian(measured.features.content),
        distances.fit_gaussian(measured.features.style),
    )
    return {
        "frechet_distance": distances.gaussian_distance(content, reference.content),
        "style_distance": distances.gaussian_distance(style, reference.style),
    }


def _rename(row: Row, *names: str) -> Row:
    return dict(zip(names, row.values(), strict=True))


def _against(measured: _Measured, reference: _Reference, neighbours: int) -> Row:
    ours, theirs = measured.features.content, reference.set.features.content
    groups = (measured.prompt, reference.set.prompt)
    given = all(int(group.bincount()[group].min()) > 1 for group in groups)  # a single picture has no pair
    return {
        **_frechet(measured, reference),
        "kernel_distance": distances.kernel_distance(ours, theirs, *(groups if given else ())),
        **distances.manifold(theirs, ours, neighbours)._asdict(),
    }


def _within(measured: _Measured) -> Row:
    row: Row = {}
    if measured.right:
        row["attribute_accuracy"] = _accuracy(measured)
    spread = distances.diversity(measured.features.content, measured.prompt)
    return row if spread is None else {**row, "diversity": spread}


def _accuracy(measured: _Measured) -> float:
    return all_right(measured.right).nanmean().item()


def _per_attribute(measured: _Measured) -> Row:
    return _rounded({name: values.nanmean().item() for name, values in measured.right.items()})


def _over_noise(measured: _Measured, reference: _Reference, per_prompt: int) -> dict[str, Estimate]:
    """The figures with an error over the samples' noise: the j-th samples of all prompts form a block."""
    blocks = torch.arange(measured.count) % per_prompt

    def content(rows: Tensor) -> float:
        return distances.gaussian_distance(
            distances.fit_gaussian(measured.features.content[rows]), reference.content
        )

    def style(rows: Tensor) -> float:
        return distances.gaussian_distance(
            distances.fit_gaussian(measured.features.style[rows]), reference.style
        )

    def accuracy(rows: Tensor) -> float:
        return _accuracy(measured.rows(rows))

    statistics = {"frechet_distance": content, "style_distance": style}
    if measured.right:
        statistics["attribute_accuracy"] = accuracy
    return {name: jackknife(statistic, blocks) for name, statistic in statistics.items()}


def _halves(reference: _Measured, neighbours: int, seed: int) -> Row:
    """Distances of random halves, averaged; what needs no second set is of the whole reference."""
    rows = []
    for split in range(HALVINGS):
        order = torch.from_numpy(philox(seed, "halves", split).permutation(reference.count))
        order = order[reference.prompt[order].argsort(stable=True)]  # prompt by prompt, random within each
        half = reference.count // 2
        first, second = order[0::2][:half], order[1::2][:half]
        rows.append(_against(reference.rows(first), _Reference(reference.rows(second)), neighbours))
    mean = {name: math.fsum(row[name] for row in rows) / HALVINGS for name in rows[0]}
    return {**mean, **_within(reference), "count": reference.count // 2}


def _rounded(row: Mapping[str, float]) -> Row:
    return {name: value if isinstance(value, int) else _digits(value) for name, value in row.items()}


def _digits(value: float) -> float:
    """6 significant digits: what a rerun repeats, whatever the order of additions."""
    return float(f"{value:.6g}")
