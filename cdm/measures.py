"""Records of the measures of an evaluation, and of the models that they use. Whatever needs to know of a measure reads
its record: the check of a params file, the search for its models before a run, its computation, and every table and
plot that shows it. Another measure is another record in `MEASURES`, and the function that it names. Functions and
classes are named as "module:name" and imported when they are used (`load`), so that this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal

from cdm.errors import CdmError

FEWEST_PROMPTS = 8
"""Fewest prompts for which there is an interval: fewer do not tell how they vary."""


@dataclass(frozen=True)
class Drift:
    """How a sentence says that a quantity of the student's pictures is not that of the teacher's."""

    subject: str
    """What the sentence is about, such as "contrast"."""
    least: float
    """The smallest difference that is worth a sentence, in `unit`."""
    unit: str = "%"
    """Of the difference; per cent are of the teacher's figure."""
    above: str = "above"
    """How what is more is called."""
    below: str = "below"
    too_much: str = ""
    """What more of it than in the teacher's pictures comes from; `{guidance}` is the parameter of the guidance."""
    too_little: str = ""
    guided_by_step: bool = False
    """Whether guidance makes more of it with every step."""


@dataclass(frozen=True)
class Quantity:
    """A number that is measured of a sample set: its key in metrics/quality.json, and how tables and plots show it."""

    key: str
    title: str
    better: Literal["low", "high", None] = None
    """Which values are good; None: those of the reference, neither more nor less."""
    meaning: str = ""
    """What it says, for a reader of the report."""
    decimals: int = 3
    """Behind the point, in the tables that compare methods."""
    percent: bool = False
    """Whether it is a share that reads well in per cent."""
    drift: Drift | None = None
    """What is said where it differs from the teacher's; None: nothing."""

    @property
    def arrow(self) -> str:
        """Which way is better: ↓, ↑ or nothing."""
        return {"low": "↓", "high": "↑", None: ""}[self.better]


@dataclass(frozen=True)
class MetricModel:
    """A model that a measure uses: a field of the section `evaluate.models` says where it is."""

    key: str
    """The name of that field."""
    title: str
    """What the report calls it."""
    loader: str
    """Makes it from its file or folder (Path), a torch device, and the name that the report shows (str)."""
    files: tuple[str, ...] = ()
    """What its folder must hold, as patterns; empty where the model is one file of weights."""
    converter: str | None = None
    """Makes it of what is published, into a folder (Path); None where that is read as it is."""


@dataclass(frozen=True)
class Measure:
    """A measure that `evaluate.metrics` can choose."""

    name: str
    kind: Literal["distance", "variety", "score", "pairs", "look"]
    """What it is computed from, and so what `compute` is called with:

    distance  the features of a set and of the reference: compute(ours, theirs, neighbours), of two
              cdm.evaluation.feature_sets.FeatureSet and `evaluate.neighbours`, returns a value for each quantity
    variety   the features of a set alone: compute(features), of a float64 matrix (pictures, features), returns a value;
              the first quantity is that of all pictures, the second the mean of those of each prompt
    score     each picture and its prompt: compute(*models) returns a cdm.evaluation.models.base.PictureScorer, whose
              mean is the quantity
    pairs     the pictures of one prompt: compute(model, pictures) returns a value, whose mean is the quantity
    look      each picture alone, without a model: compute(pictures), of uint8 (n, 3, height, width), returns a value of
              each picture for each quantity, float64 (n,), whose mean is the quantity
    """
    models: tuple[str, ...]
    """Keys of the models that it needs; the features of a distance or variety are those of the first."""
    compute: str
    quantities: tuple[Quantity, ...]
    uses_neighbours: bool = False
    """Whether it looks at nearest neighbours, of which small sets have too few."""
    of_crops: bool = False
    """Whether its features are of the middle of each picture at full resolution, as large as the model takes it."""


def load(name: str) -> Any:
    """The function or class that "module:name" names; its module is imported."""
    module, _, attribute = name.partition(":")
    return attrgetter(attribute)(import_module(module))


_PICTURES = ("config.json", "preprocessor_config.json", "*.safetensors")
_PICTURES_AND_TEXTS = (*_PICTURES, "vocab.json", "merges.txt")
_MODELS = (
    MetricModel("clip", "CLIP", "cdm.evaluation.models.clip:Clip", _PICTURES_AND_TEXTS),
    MetricModel("dinov2", "DINOv2", "cdm.evaluation.models.dinov2:Dinov2Features", _PICTURES),
    MetricModel("pick_score", "PickScore", "cdm.evaluation.models.clip:Clip", _PICTURES_AND_TEXTS),
    MetricModel(
        "hps", "HPS v2", "cdm.evaluation.models.clip:Clip", _PICTURES_AND_TEXTS, "cdm.models.hps:convert_files"
    ),
    MetricModel("inception", "InceptionV3", "cdm.evaluation.models.inception:InceptionFeatures"),
    MetricModel("aesthetic", "the aesthetic head", "cdm.evaluation.models.clip:AestheticHead"),
    MetricModel(
        "lpips", "LPIPS", "cdm.evaluation.models.lpips:Lpips", ("alexnet-owt-7be5be79.pth", "alex.pth")
    ),
)
MODELS: dict[str, MetricModel] = {model.key: model for model in _MODELS}
"""By the key of `evaluate.models`."""


_JUDGED = (
    Quantity("evaluations", "Evaluations"),
    Quantity(
        "frechet_distance",
        "Fréchet distance",
        "low",
        "how far what the pictures show is from the reference",
        decimals=2,
    ),
    Quantity(
        "style_distance",
        "Style distance",
        "low",
        "the same for how they show it: blur, contrast, colour",
        decimals=2,
    ),
    Quantity(
        "attribute_accuracy",
        "All attributes right",
        "high",
        "pictures that show everything that their prompt names",
        percent=True,
    ),
    Quantity("precision", "Precision", "high", "samples that lie among the reference pictures"),
    Quantity("recall", "Recall", "high", "reference pictures that lie among the samples"),
    Quantity(
        "diversity",
        "Diversity",
        None,
        "mean distance of two pictures of a prompt; best where real ones are",
        decimals=2,
    ),
    Quantity("density", "Density", None, "reference pictures around a sample; about 1 for perfect samples"),
    Quantity("coverage", "Coverage", "high", "reference pictures with a sample in their neighbourhood"),
    Quantity("kernel_distance", "Kernel distance", "low", "another distance; 0 on average for perfect samples"),
    Quantity(
        "frechet_to_teacher", "Fréchet to teacher", "low", "to the teacher's full-length samples, same noise"
    ),
    Quantity("style_to_teacher", "Style to teacher", "low", "the same for style"),
)
JUDGED: dict[str, Quantity] = {quantity.key: quantity for quantity in _JUDGED}
"""What every evaluation measures (cdm.evaluation.quality), with the judge or on the pixels, by key."""
_HEADLINES = ("frechet_distance", "style_distance", "attribute_accuracy")
HEADLINES = [JUDGED[key] for key in _HEADLINES]
"""What a summary shows."""
_OF_PIXELS = {
    "frechet_distance": (
        "Distance of pixel statistics",
        "of means over 8x8 cells: layout and colour, not objects",
    ),
    "style_distance": ("Distance of pixel detail", "of deviations and detail of each colour: blur, contrast"),
    "kernel_distance": ("Kernel distance, pixels", ""),
    "frechet_to_teacher": ("Pixel statistics to teacher", ""),
    "style_to_teacher": ("Pixel detail to teacher", "the same for detail"),
    **{
        key: (f"{JUDGED[key].title}, pixels", "")
        for key in ("precision", "recall", "diversity", "density", "coverage")
    },
}
"""Titles and meanings of what is measured without a judge; of those without a meaning it is the judge's."""


def basics(judged: bool) -> dict[str, Quantity]:
    """What every evaluation measures, by key: `JUDGED`, or without a judge the same called by what it is, figures of
    pixel statistics."""
    if judged:
        return JUDGED
    found = dict(JUDGED)
    for key, (title, meaning) in _OF_PIXELS.items():
        found[key] = replace(JUDGED[key], title=title, meaning=meaning or JUDGED[key].meaning)
    return found


def headlines(judged: bool) -> list[Quantity]:
    """What a summary shows, called by what it is."""
    return [basics(judged)[key] for key in _HEADLINES]


def by_judge(quality: Mapping[str, Any]) -> bool:
    """Whether a judge saw the pictures whose figures are those of metrics/quality.json, and not pixel statistics."""
    basis = quality.get("basis") or {}
    if "judge" in basis:
        return basis["judge"] is not None
    return any("attribute_accuracy" in row for row in quality["student"].values())


def _on_features(model: str, frechet: str, kernel: str, patch: str) -> list[Measure]:
    """The measures on the features of one model; `frechet`, `kernel` and `patch` are the titles of its distances."""
    title = MODELS[model].title

    def quantity(key: str, name: str, better: Literal["low", "high", None], meaning: str) -> Quantity:
        return Quantity(f"{key}_{model}", name, better, f"{meaning}; features of {title}")

    return [
        Measure(
            f"frechet_{model}",
            "distance",
            (model,),
            "cdm.evaluation.feature_sets:frechet",
            (quantity("frechet", frechet, "low", "Fréchet distance to the reference"),),
        ),
        Measure(
            f"patch_frechet_{model}",
            "distance",
            (model,),
            "cdm.evaluation.feature_sets:frechet",
            (
                quantity(
                    "patch_frechet",
                    patch,
                    "low",
                    "Fréchet distance of the middle of pictures at full resolution, which sees blur",
                ),
            ),
            of_crops=True,
        ),
        Measure(
            f"kernel_{model}",
            "distance",
            (model,),
            "cdm.evaluation.feature_sets:kernel",
            (
                quantity(
                    "kernel",
                    kernel,
                    "low",
                    "kernel distance to the reference; 0 on average for perfect samples",
                ),
            ),
        ),
        Measure(
            f"prdc_{model}",
            "distance",
            (model,),
            "cdm.evaluation.feature_sets:manifold",
            (
                quantity(
                    "precision",
                    f"Precision, {title}",
                    "high",
                    "samples that lie among the reference pictures",
                ),
                quantity("recall", f"Recall, {title}", "high", "reference pictures that lie among the samples"),
                quantity("density", f"Density, {title}", None, "reference pictures around a sample"),
                quantity(
                    "coverage",
                    f"Coverage, {title}",
                    "high",
                    "reference pictures with a sample in their neighbourhood",
                ),
            ),
            uses_neighbours=True,
        ),
        Measure(
            f"vendi_{model}",
            "variety",
            (model,),
            "cdm.evaluation.distances:vendi",
            (
                quantity("vendi", f"Vendi, {title}", None, "effective number of different pictures"),
                quantity(
                    "vendi_in_prompt",
                    f"Vendi in a prompt, {title}",
                    None,
                    "the same of the pictures of one prompt",
                ),
            ),
        ),
    ]


def _score(name: str, models: tuple[str, ...], compute: str, title: str, meaning: str) -> Measure:
    quantity = Quantity(name, title, "high", meaning)
    return Measure(name, "score", models, compute, (quantity,))


def _by_guidance(subject: str) -> Drift:
    """Of what guidance makes more of, with every step."""
    causes = {"too_much": "too much guidance ({guidance})", "too_little": "too little guidance ({guidance})"}
    return Drift(subject, 3.0, **causes, guided_by_step=True)


def _look(name: str, compute: str, *quantities: Quantity) -> Measure:
    return Measure(name, "look", (), compute, quantities)


def _cast(key: str, title: str, axis: str, above: str, below: str) -> Quantity:
    meaning = f"mean colour of a picture in CIELAB: {axis}, from {below} below 0 to {above} above"
    drift = Drift("the mean colour", 1.0, f"of {axis}", f"more {above} than", f"more {below} than")
    return Quantity(key, title, None, meaning, decimals=2, drift=drift)


_MEASURES = (
    *_on_features("inception", "FID", "KID", "Patch FID"),
    *_on_features("dinov2", "FD, DINOv2", "KD, DINOv2", "Patch FD, DINOv2"),
    Measure(
        "cmmd",
        "distance",
        ("clip",),
        "cdm.evaluation.feature_sets:cmmd",
        (Quantity("cmmd", "CMMD", "low", "kernel distance to the reference in CLIP's image embeddings"),),
    ),
    _score(
        "clip_score",
        ("clip",),
        "cdm.evaluation.models.clip:clip_score",
        "CLIPScore",
        "how well a picture fits its prompt, as CLIP sees it",
    ),
    _score(
        "pick_score",
        ("pick_score",),
        "cdm.evaluation.models.clip:pick_score",
        "PickScore",
        "which picture of a prompt people would pick, as a model has learnt it",
    ),
    _score(
        "hps",
        ("hps",),
        "cdm.evaluation.models.clip:hps",
        "HPS v2",
        "the same, learnt from other people's choices",
    ),
    _score(
        "aesthetic",
        ("clip", "aesthetic"),
        "cdm.evaluation.models.clip:Aesthetic",
        "Aesthetic",
        "how beautiful people would find the picture, whatever its prompt",
    ),
    Measure(
        "lpips",
        "pairs",
        ("lpips",),
        "cdm.evaluation.models.lpips:Lpips.mean_distance",
        (
            Quantity(
                "lpips_diversity", "LPIPS diversity", None, "mean LPIPS distance of two pictures of one prompt"
            ),
        ),
    ),
    _look(
        "saturation",
        "cdm.evaluation.looks:saturation",
        Quantity(
            "saturation",
            "Saturation",
            None,
            "mean saturation (HSV) of the pixels, 0 to 1",
            drift=_by_guidance("saturation"),
        ),
    ),
    _look(
        "contrast",
        "cdm.evaluation.looks:contrast",
        Quantity(
            "contrast",
            "RMS contrast",
            None,
            "standard deviation of a picture's luma, 0 to 0.5",
            drift=_by_guidance("contrast"),
        ),
    ),
    _look(
        "colour_cast",
        "cdm.evaluation.looks:colour_cast",
        _cast("cast_red", "Cast, red", "a*", "red", "green"),
        _cast("cast_yellow", "Cast, yellow", "b*", "yellow", "blue"),
    ),
    _look(
        "sharpness",
        "cdm.evaluation.looks:sharpness",
        Quantity(
            "sharpness",
            "Sharpness",
            None,
            "deviation of the luma's Laplacian by the contrast: blur lowers it, noise raises it",
            drift=Drift("sharpness", 3.0, too_much="noise or hard edges", too_little="blur"),
        ),
    ),
)
LOOKS = [measure.name for measure in _MEASURES if measure.kind == "look"]
"""Names of the measures that need no model."""
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _MEASURES}
"""What `evaluate.metrics` can choose, by name."""


def check_name(name: str) -> str:
    """`name` if it is a measure's; raises CdmError with the known names."""
    if name not in MEASURES:
        raise CdmError(f"unknown measure {name!r} (known: {', '.join(MEASURES)})")
    return name


def chosen(names: Iterable[str]) -> list[Measure]:
    """The measures of these names; raises CdmError with the known names."""
    return [MEASURES[check_name(name)] for name in names]


def is_quality(found: Any) -> bool:
    """Whether a JSON value has the form of metrics/quality.json: rows of student and teacher by `stepsN`."""
    if not isinstance(found, dict) or not isinstance(found.get("basis", {}), dict | None):
        return False
    tables: list[Any] = [found.get("student"), found.get("teacher")]
    named = all(_is_table(table, _is_number) and all(map(_is_steps, table)) for table in tables)
    replicates = found.get("replicates", {})
    return named and _is_table(replicates, lambda sets: _is_table(sets, _is_numbers, least=0), least=0)


def _is_table(value: Any, is_cell: Callable[[Any], bool], least: int = 1) -> bool:
    """Whether a value is a mapping of mappings of such cells, with at least so many rows."""
    rows = value.values() if isinstance(value, dict) else []
    return (
        isinstance(value, dict)
        and len(value) >= least
        and all(isinstance(row, dict) and all(map(is_cell, row.values())) for row in rows)
    )


def _is_steps(name: str) -> bool:
    return name.startswith("steps") and name.removeprefix("steps").isdecimal()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def most_neighbours(samples: int, reference: int | None = None) -> int:
    """The largest `evaluate.neighbours` that so many samples and pictures of the reference, of which halves are
    compared as well, have; below 1 where they are too few for any. None: the reference is not known yet."""
    return min(samples, samples if reference is None else reference // 2) - 1


def quantities() -> dict[str, Quantity]:
    """The quantities of all measures in `MEASURES`, by key."""
    return {quantity.key: quantity for measure in MEASURES.values() for quantity in measure.quantities}


def steps_in_words(count: int) -> str:
    """A number of steps as tables and sentences have it."""
    return "1 step" if count == 1 else f"{count} steps"


def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t for 3 degrees of freedom or more, within 1 %: standard errors on either side
    that hold 95 % where the error itself is estimated from few blocks of samples.

    The expansion about the normal quantile: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    x = 1.959964
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return x + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
