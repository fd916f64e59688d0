"""Every parameter of the pipeline: typed, frozen, unknown keys refused, each with its meaning and its unit.

A params file is YAML 1.2 with the sections below; `load` turns it into `Params` or raises `ParamsError` with one
line a problem. Sections are the unit of change: a DVC stage lists the sections that it reads, and `runtime` holds
what must not change a result, so that no stage lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from cdm import limits, measures
from cdm.errors import CdmError, line, shown
from cdm.families import check_name
from cdm.system.files import at_home


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


def _on_a_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"expected a text of printable characters on one line, not {shown(text)}")
    return text


NUMBER = BeforeValidator(_no_truth)
Text = Annotated[str, Field(min_length=1), AfterValidator(_on_a_line)]
"""A name or a path."""

Seed = Annotated[int, Field(ge=0, le=limits.SEED), NUMBER]
Steps = Annotated[int, Field(ge=1, le=limits.STEPS), NUMBER]
Iterations = Annotated[int, Field(ge=1, le=limits.ITERATIONS), NUMBER]
IterationsOrNone = Annotated[int, Field(ge=0, le=limits.ITERATIONS), NUMBER]
Batch = Annotated[int, Field(ge=1, le=limits.BATCH), NUMBER]
Samples = Annotated[int, Field(ge=1, le=limits.SAMPLES), NUMBER]
Level = Annotated[float, Field(gt=0, lt=1), NUMBER]
"""A noise level sigma: 0 is data, 1 is noise."""
Rate = Annotated[float, Field(gt=0, le=1), NUMBER]
Decay = Annotated[float, Field(ge=0, lt=1), NUMBER]
Weight = Annotated[float, Field(ge=0, le=limits.WEIGHT), NUMBER]
Power = Annotated[float, Field(ge=0, le=limits.POWER), NUMBER]
Norm = Annotated[float, Field(gt=0, le=limits.NORM), NUMBER]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Guidance = Annotated[float, Field(ge=1, le=limits.GUIDANCE), NUMBER]
StepsList = Annotated[list[Steps], Field(max_length=limits.LIST)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu|hpu|mtia)(:\d{1,3})?)$")]

MOST_PROBLEMS = 20
"""Problems of a file that are told; of the rest the number is."""


Location = Annotated[Text, AfterValidator(lambda path: str(at_home(path)) if path.startswith("~") else path)]
"""A path, in which `~` is the home folder."""
Locations = Annotated[list[Location], Field(max_length=limits.FILES)]


class ParamsError(CdmError):
    """A params file that cannot be used; the message has one line a problem."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class Teacher(Section):
    """The diffusion model to distil."""

    family: Text
    """Architecture: which module of cdm.families knows the model."""
    source: Location
    """A diffusers folder, or the id `org/name` of a model on a hub."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; null means its main branch. Resolved to a commit and recorded."""
    guidance_scale: Guidance
    """Classifier-free guidance of the teacher in every comparison and in the cached latents; 1 is none."""
    resolution: Annotated[int, Field(ge=1, le=limits.PIXELS), NUMBER] | None = None
    """Height and width of the pictures in pixels; null is what the model is made for."""

    @field_validator("family")
    @classmethod
    def _known_family(cls, name: str) -> str:
        try:
            return check_name(name)
        except CdmError as error:
            raise ValueError(str(error)) from None


class Prompts(Section):
    """The prompts that the student is trained on, and those that it is evaluated on."""

    train: Annotated[Locations, Field(min_length=1)]
    """Files of training prompts: .txt (one a line), .json, .jsonl, .csv or .parquet (see `column`), or folders."""
    eval: Locations = []
    """Files of evaluation prompts; where empty, `eval_count` prompts are held back from the training ones."""
    eval_count: Annotated[int, Field(ge=1, le=limits.PROMPTS), NUMBER]
    """Number of evaluation prompts: the first of `eval`, or a random choice of the training prompts."""
    column: Text = "prompt"
    """Column or key that holds the prompt in .jsonl, .csv and .parquet files."""
    max_sequence_length: Annotated[int, Field(ge=0, le=limits.TOKENS), NUMBER]
    """Text tokens of the large encoder (T5 in SD3); 0 for a pipeline without one."""
    embed: Literal["cached", "online"] = "cached"
    """Encode the training prompts once into shards, or while training (for lists too long to store)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the text encoders, and what embeddings are stored in (training takes them as float32)."""


class Latents(Section):
    """The teacher's own samples: the reference of the evaluation and the pairs of a regression term."""

    steps: Steps
    """Steps of the teacher's full-length sampling (each costs two evaluations where guided)."""
    per_prompt: Samples
    """Samples of each evaluation prompt; the student is compared on the same noise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of teacher and student in every comparison."""
    train_pairs: Annotated[int, Field(ge=0, le=limits.PROMPTS), NUMBER] = 0
    """Training prompts of which one sample each is kept too, with its noise: what a regression term learns from."""


class Schedule(Section):
    """The noise levels of the student's rollout."""

    kind: Literal["dynamic", "fixed"]
    """dynamic: a random length and random levels for every sample; fixed: always `sigmas`."""
    min_len: Steps
    """Shortest rollout, in steps (dynamic)."""
    max_len: Steps
    """Longest rollout, in steps (dynamic)."""
    sigma_min: Level
    """Lowest inner level before the teacher's shift (dynamic), and of the off-trajectory points (not shifted)."""
    sigma_max: Level
    """Highest inner level before the teacher's shift (dynamic), and of the off-trajectory points (not shifted)."""
    off_range: tuple[Share, Share] | None = None
    """Levels of the off-trajectory points (CDM), drawn from this range and then kept within `renoise_min` and
    `renoise_max`; null is from `sigma_min` to `sigma_max`."""
    spacing: Literal["stratified", "independent"] = "stratified"
    """Inner levels: one in each of equal bins, or drawn independently (dynamic)."""
    sigmas: Annotated[list[Rate], Field(max_length=limits.STEPS)] = [1.0, 0.75, 0.5, 0.25]
    """Levels before the teacher's shift (fixed); the first is 1."""
    ends: Literal["data", "next"] = "data"
    """What distribution matching compares: the student's data, or its state at the next level, where its step ends."""

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if self.max_len < self.min_len:
            raise ValueError(f"max_len {self.max_len} is below min_len {self.min_len}")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max {self.sigma_max} is not above sigma_min {self.sigma_min}")
        if self.off_range is not None and self.off_range[1] < self.off_range[0]:
            raise ValueError(f"off_range falls from {self.off_range[0]} to {self.off_range[1]}")
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not self.sigmas or self.sigmas[0] != 1.0 or not falling:
            raise ValueError(f"sigmas must fall from 1.0, not {shown(self.sigmas)}")
        return self


@dataclass(frozen=True)
class Needs:
    """What a term of the loss takes in a student update: network calls on one sample, and conditions.

    This is the term's record: the training step, the checks of a params file, `cdm plan` and the comparison of methods
    read it, and none of them knows a term by its name. Calls without a graph are plain forward passes; one with a graph
    has a backward pass through it as well.
    """

    anchor: bool = False
    """The gradient goes through the student's prediction at its anchor, which all such terms share."""
    teacher: int = 0
    """Calls of the teacher."""
    teacher_shared: int = 0
    """Of these, calls that DM's answer can replace on samples where its noise level is one for this term too."""
    fake: int = 0
    """Calls of the fake score without a graph."""
    fake_graph: int = 0
    """Calls of the fake score with a graph to its input."""
    student: int = 0
    """Calls of the student without a graph; a derivative carried along counts as one more."""
    student_graph: int = 0
    """Calls of the student with a graph, beside the one at the anchor."""
    pairs: bool = False
    """It learns from pairs of noise and teacher's samples (`latents.train_pairs`)."""
    states: bool = False
    """It can match states at the next noise level instead of data (`schedule.ends: next`)."""
    sharded: bool = True
    """It works where parameters are sharded over processes (FSDP2), which cannot differentiate a network in its
    input."""


class TermSettings(Section):
    """The settings of a term of the student's loss; its function is in `cdm.training.terms` under the same name."""

    weight: Weight = 0.0
    """Factor of the term in the student's loss; at 0 nothing of it is computed."""

    @property
    def needs(self) -> Needs:
        """What the term takes, at these settings and a weight above 0."""
        raise NotImplementedError


def _guided_calls(guidance_scale: float) -> int:
    """Calls of a teacher at this strength of classifier-free guidance: 1 is none."""
    return 2 if guidance_scale > 1 else 1


class MatchingLoss(TermSettings):
    """Distribution matching at the student's anchor (DM)."""

    weight: Weight
    """Factor of the term in the student's loss; at 0 nothing of it is computed."""
    bounded: bool = False
    """Re-noise below the student's own level, tau ~ U(0, sigma), instead of tau ~ U(0, 1)."""
    guidance_scale: Guidance = 1.0
    """Guidance, by its family's rule, of the teacher that is matched (DMD, DMD2); 1 is none, and leaves it to CA."""

    @property
    def needs(self) -> Needs:
        return Needs(anchor=True, teacher=_guided_calls(self.guidance_scale), fake=1, states=True)


class OffTrajectoryLoss(MatchingLoss):
    """Distribution matching off the trajectory (CDM), at points extrapolated along the student's velocity."""

    @property
    def needs(self) -> Needs:
        return Needs(teacher=_guided_calls(self.guidance_scale), fake=1, student_graph=1)


class GuidanceLoss(TermSettings):
    """CFG augmentation (CA): classifier-free guidance as a separate direction of the student's update."""

    weight: Weight
    """Factor of the term in the student's loss; at 0 nothing of it is computed."""
    scale: Annotated[float, Field(ge=0, le=limits.GUIDANCE), NUMBER]
    """Strength of the guidance direction: SD3-Medium 7, the miniature about 0.5 to 1.2."""
    bounded: bool = True
    """Re-noise below the student's own level, tau ~ U(0, sigma): the paper finds that it matters here."""
    fade: Power = 0.0
    """Power of the student's own level that multiplies `scale`: above 0 later steps are guided less."""
    point: Literal["shared", "own"] = "shared"
    """Where DM's re-noised point suits CA too, take that (shared), which saves the teacher a forward; or always a point
    of its own, whose errors are not those of DM's."""

    @property
    def needs(self) -> Needs:
        return Needs(anchor=True, teacher=2, teacher_shared=int(self.point == "shared"))


class RegressionLoss(TermSettings):
    """Regression (DMD): the student's one-step sample from a pair's noise is fitted to the teacher's sample."""

    weight: Weight = 0.0
    """Factor of the term in the student's loss (DMD 0.25); at 0 nothing of it is computed."""

    @property
    def needs(self) -> Needs:
        return Needs(student_graph=1, pairs=True)


class ScoreGradientLoss(TermSettings):
    """Score-gradient matching (SGMD): the student descends the squared difference of the two scores."""

    bounded: bool = False
    """Re-noise below the student's own level, tau ~ U(0, sigma), instead of tau ~ U(0, 1)."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance of the teacher that is matched; 1 is none."""
    regulariser: Weight = 0.1
    """Share of the fake score's own error that is taken off (the paper finds that more hurts)."""

    @property
    def needs(self) -> Needs:
        return Needs(anchor=True, teacher=_guided_calls(self.guidance_scale), fake_graph=1, sharded=False)


class ConsistencyLoss(TermSettings):
    """Consistency: the student's predicted data are constant along the teacher's flow."""

    guidance_scale: Guidance = 1.0
    """Classifier-free guidance of the teacher whose flow it is; 1 is none."""
    warmup: IterationsOrNone = 100
    """Student updates over which the tangent's second part, the derivative of the student's velocity, is ramped up."""
    step: Share = 0.0
    """Length in sigma of the step along the flow; 0 is the derivative itself, by forward-mode differentiation."""

    @property
    def needs(self) -> Needs:
        teacher, by_steps = _guided_calls(self.guidance_scale), self.step > 0
        return Needs(anchor=True, teacher=teacher, student=1 if by_steps else 2, sharded=by_steps)


class Losses(Section):
    """The terms of the student's loss."""

    ca: GuidanceLoss
    dm: MatchingLoss
    cdm: OffTrajectoryLoss
    regression: RegressionLoss = RegressionLoss()
    sgmd: ScoreGradientLoss = ScoreGradientLoss()
    consistency: ConsistencyLoss = ConsistencyLoss()
    min_norm: Norm = 0.1
    """Least distance between student and teacher, in units of the latents, by which directions are divided."""

    @property
    def terms(self) -> dict[str, TermSettings]:
        """The settings of the terms that have a weight, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: each for name, each in found.items() if isinstance(each, TermSettings) and each.weight}

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the terms that have one."""
        return {name: term.weight for name, term in self.terms.items()}

    @property
    def guided(self) -> list[str]:
        """Names of the terms that match a teacher of a guidance of their own, whatever their weight."""
        names = type(self).model_fields
        return [name for name in names if hasattr(getattr(self, name), "guidance_scale")]

    @property
    def needs(self) -> dict[str, Needs]:
        """The records of the terms that have a weight."""
        return {name: term.needs for name, term in self.terms.items()}

    @property
    def at_anchor(self) -> bool:
        """Whether the gradient of any term goes through the student's prediction at its anchor."""
        return any(needs.anchor for needs in self.needs.values())

    @property
    def ask_fake(self) -> bool:
        """Whether any term asks the fake score; without one there is none."""
        return any(needs.fake or needs.fake_graph for needs in self.needs.values())

    @model_validator(mode="after")
    def _has_a_term(self) -> Losses:
        if not self.weights:
            raise ValueError("all terms have weight 0: the student would learn nothing")
        return self


class Optimiser(Section):
    """AdamW for one network."""

    lr: Rate
    """Learning rate after the warm-up."""
    warmup: IterationsOrNone = 100
    """Updates over which the learning rate rises from 0."""
    decay_from: Share = 1.0
    """Share of the updates after which the learning rate falls linearly to 0; 1 keeps it constant."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: Rate = 1e-8
    """AdamW's epsilon."""
    weight_decay: Power = 1e-4
    """AdamW's decoupled weight decay."""
    clip: Norm = 1.0
    """Largest norm of the gradient."""
    states: Literal["fp32", "8bit"] = "fp32"
    """Precision of the moments: 8bit takes a quarter of the memory, coarsely rounded; needs bitsandbytes."""


LORA_TARGETS = ("attention", "attention+feed-forward")
"""Layers of every family that a LoRA can adapt, by a name."""


class Lora(Section):
    """Low-rank adapters of some linear layers, for the student and the fake score, on one frozen teacher."""

    rank: Annotated[int, Field(ge=1, le=limits.RANK), NUMBER]
    """Rank of an adapter's update (authors: 64)."""
    alpha: Annotated[float, Field(gt=0, le=limits.WEIGHT), NUMBER]
    """An adapter's update is scaled by alpha / rank while it learns (authors: 128); a saved one has no factor left."""
    targets: Text | Annotated[list[Text], Field(max_length=limits.LIST)] = "attention"
    """Layers that are adapted: attention, attention+feed-forward (the authors'), or a list of ends of layers' names,
    such as `to_q`, in which * stands for anything."""
    base: Literal["precision", "8bit", "4bit"] = "precision"
    """What the frozen weights of the blocks are kept in: the type of `precision`, or fewer bits, which need
    bitsandbytes. The teacher is rounded with them."""

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, value: Any) -> Any:
        listed = isinstance(value, list) and value and all(isinstance(each, str) and each for each in value)
        if value not in LORA_TARGETS and not listed:
            raise ValueError(
                f"{shown(value)} is neither {' nor '.join(LORA_TARGETS)} nor a list of ends of layers' names"
            )
        return value


class Probe(Section):
    """Quality during training: a Fréchet distance of the student's latents to the teacher's, and how pictures look."""

    reference: Literal["none", "latents"] = "none"
    """What the student is compared with: the teacher's full-length latents; none is no probe."""
    every: Iterations = 200
    """Iterations between two probes; the last iteration has one too."""
    samples: Annotated[int, Field(ge=2, le=limits.SAMPLES), NUMBER] = 256
    """Samples at each number of steps: best a multiple of the evaluation prompts, some hundreds."""
    steps: Annotated[StepsList, Field(min_length=1)] = [1, 2, 4, 8]
    """Numbers of steps that are probed; their mean is what `distill.keep` goes by."""
    metrics: Annotated[list[Text], Field(max_length=limits.LIST)] = []
    """Measures without a model, such as contrast, of the probe's pictures, which are decoded for them."""
    best_by: Text = "distance"
    """What `distill.keep` best goes by: distance, that of latents, or one of `metrics`: how little it differs from the
    teacher's."""

    @property
    def best_column(self) -> str:
        """The column of the log that `distill.keep` best goes by."""
        return "probe" if self.best_by == "distance" else f"probe_{self.best_by}"

    @field_validator("metrics")
    @classmethod
    def _without_a_model(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in measures.LOOKS]
        if unknown:
            raise ValueError(
                f"{shown(unknown[0])} is no measure without a model (known: {', '.join(measures.LOOKS)})"
            )
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        if len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps names a number twice: {shown(self.steps)}")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics names something twice: {', '.join(self.metrics)}")
        if self.metrics and self.reference == "none":
            raise ValueError("metrics are chosen, but there is no probe: set reference to latents")
        if self.best_by not in ("distance", *self.metrics):
            raise ValueError(f"best_by is {shown(self.best_by)}, which is neither distance nor one of metrics")
        return self


class Distill(Section):
    """The training of the student."""

    iterations: Iterations
    """Iterations; each updates the fake score, every `student_every`-th also the student."""
    batch_size: Batch
    """Samples of an iteration, over all processes."""
    student_every: Iterations = 2
    """Fake-score updates for one student update."""
    fake_only: IterationsOrNone = 0
    """First iterations that update the fake score alone."""
    rollouts: Literal["shared", "fresh"] = "shared"
    """shared: one rollout serves a student update and its fake-score updates; fresh: every iteration has its own."""
    losses: Losses
    renoise_min: Decay = 0.02
    """Lowest re-noise level tau, after any shift."""
    renoise_max: Rate = 0.98
    """Highest re-noise level tau."""
    student: Optimiser
    fake: Optimiser
    merge: Share = 0.001
    """Share of the student that is mixed into the fake score after each of its updates."""
    fake_knows_level: bool = False
    """Condition the fake score on the noise level at which the student made its data (not in the paper)."""
    fake_target: Literal["score", "data"] = "score"
    """Target of the fake score for the student's states (`schedule.ends` next): the score of their distribution
    (Phased DMD), or the data that they were made with (TDM)."""
    fake_draws: Literal["independent", "mirrored"] = "independent"
    """Re-noising of the fake score's updates of a round: `mirrored`, every second one takes 1 - u for each level's
    uniform number and the negative noise of the one before, so that their errors cancel in part (not in the paper)."""
    fake_bounded: bool = False
    """Train the fake score below the student's own level only, tau ~ U(0, sigma), instead of tau ~ U(0, 1)."""
    ema: Share = 0.999
    """Decay of the student's moving average, which is what is saved; ramped up from 0.1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks (weights and losses stay float32)."""
    lora: Lora | None = None
    """Trained parameters: null is all weights, in a copy of the teacher for each role; else adapters on a single
    copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    probe: Probe = Probe()
    keep: Literal["last", "best"] = "last"
    """Which moving average becomes the student: that of the last iteration, or of the best probe."""

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        if self.keep == "best" and self.probe.reference == "none":
            raise ValueError("keep is best, but nothing tells which is: set probe.reference to latents")
        if self.renoise_max <= self.renoise_min:
            raise ValueError(f"renoise_max {self.renoise_max} is not above renoise_min {self.renoise_min}")
        for name in ("iterations", "fake_only"):
            value, every = getattr(self, name), self.student_every
            if value % every:
                nearest = max(round(value / every), 1) * every
                raise ValueError(f"{name} {value} is not a multiple of student_every {every}: use {nearest}")
        if self.fake_only + self.student_every > self.iterations:
            raise ValueError(
                f"iterations {self.iterations} leave no student update after fake_only {self.fake_only}"
                f" with student_every {self.student_every}"
            )
        return self


class Sample(Section):
    """The samples on which student and teacher are compared."""

    steps: Annotated[StepsList, Field(min_length=1)]
    """Numbers of steps of the student (no guidance: one evaluation a step)."""
    teacher_steps: StepsList
    """Numbers of steps of the guided teacher (two evaluations a step), beside its full-length latents."""
    pictures: Samples = 8
    """Evaluation prompts shown on contact sheets and saved as PNGs of their own."""

    @model_validator(mode="after")
    def _distinct(self) -> Sample:
        for name in ("steps", "teacher_steps"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a number twice: {shown(values)}")
        return self


class MetricModels(Section):
    """Files of the models that `metrics` use. The pipeline downloads none of them: `cdm fetch` does.

    A model is a folder, or `org/name` or `org/name@revision` in the hub's cache; cdm.measures has a record
    of each. Null is the published one, where `cdm fetch` puts it.
    """

    clip: Location = "openai/clip-vit-large-patch14"
    """CLIP of clip_score, aesthetic (which is for ViT-L/14) and cmmd (whose authors take its 336-pixel variant)."""
    dinov2: Location = "facebook/dinov2-large"
    """DINOv2 of the measures that end in _dinov2."""
    pick_score: Location = "yuvalkirstain/PickScore_v1"
    """The fine-tuned CLIP of pick_score."""
    hps: Location | None = None
    """HPS v2 or v2.1 as a transformers CLIPModel."""
    inception: Location | None = None
    """File of InceptionV3's weights for FID, of the measures that end in _inception."""
    aesthetic: Location | None = None
    """File of the LAION aesthetic head."""
    lpips: Location | None = None
    """Folder with the two files of LPIPS, of AlexNet and of its channels' weights."""


class ScorerProcess(Section):
    """A command in an environment of its own that scores pictures; docs/scorers.md has the protocol."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """What its figures are called."""
    command: Annotated[Text, Field(min_length=1)]
    """Started with two more arguments: a JSON file to read, and one to write. `~` and `$NAME` are filled in, and
    variables may stand before it: `CUDA_VISIBLE_DEVICES=1 ~/env/bin/python score.py`."""


class Evaluate(Section):
    """How samples are evaluated."""

    judge: Location | None = None
    """Folder of a judge (a classifier of the prompts' attributes); its features give the distances."""
    real: Location | None = None
    """A safetensors file of real pictures of the evaluation prompts; null compares with the teacher alone."""
    neighbours: Annotated[int, Field(ge=1, le=limits.NEIGHBOURS), NUMBER] = 3
    """k of the nearest-neighbour radii in precision and recall."""
    metrics: Annotated[list[Text], Field(max_length=limits.LIST)] = []
    """Further measures, each with a model of `models`; the stage says what is missing before anything starts."""
    models: MetricModels = MetricModels()
    scorers: Annotated[list[ScorerProcess], Field(max_length=limits.LIST)] = []
    """Processes that score pictures, such as HPSv3 or GenEval."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Where a model of `metrics` or the program of a scorer is not on this machine: refuse (every stage says so at
    once) or skip (go on without these figures; report and metrics/quality.json name them)."""
    resamples: Annotated[int, Field(ge=0, le=limits.SAMPLES), NUMBER] = 100
    """Resamples of the prompts for the intervals of `metrics` and `scorers`; 0 leaves them out."""

    @field_validator("metrics")
    @classmethod
    def _known_measures(cls, names: list[str]) -> list[str]:
        try:
            return [measures.check_name(name) for name in names]
        except CdmError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _distinct(self) -> Evaluate:
        for name, values in (("metrics", self.metrics), ("scorers", [scorer.name for scorer in self.scorers])):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice: {', '.join(values)}")
        taken = {scorer.name for scorer in self.scorers} & measures.MEASURES.keys()
        if taken:
            raise ValueError(f"a scorer is called {min(taken)}, as a metric is: give it another name")
        return self


class Runtime(Section):
    """Settings of the machine, such as the device: no stage depends on them. Another device, another number of threads
    and compiled blocks may round differently; nothing else here changes a result."""

    device: Device = "auto"
    """auto (CUDA, then MPS, then CPU), or a torch device."""
    threads: Annotated[int, Field(ge=0, le=limits.THREADS), NUMBER] = 0
    """CPU threads of torch; 0 leaves its default, one for each core. Their number decides how sums are rounded, so one
    thread gives the same bytes on machines that differ in their cores alone."""
    batch_size: Batch = 64
    """Prompts encoded, or samples drawn, at once."""
    accelerate_config: Location | None = None
    """A file of configs/: `distill` starts itself through `accelerate launch` with it."""
    micro_batch: Batch | None = None
    """Samples of a process in one forward and backward (gradients accumulate); null means all of them."""
    compile: bool = False
    """Whether torch compiles the blocks of the networks for a GPU: the first rounds take minutes, those after them less
    time. Sums are rounded otherwise, as on another device."""
    offload_encoders: bool = False
    """With prompts.embed online: the text encoders wait in the CPU's memory between two batches."""
    checkpoint_every: Iterations = 200
    """Iterations between two checkpoints (the last two are kept)."""
    pictures_every: IterationsOrNone = 200
    """Iterations between two sheets of pictures in logs/pictures; the last iteration has one too; 0 is never."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Experiment tracker that gets the figures of a training, besides the log; its package must be installed."""
    timeout_hours: Annotated[float, Field(gt=0, le=limits.HOURS), NUMBER] = 2.0
    """Hours that one of several processes waits for the others before it gives up."""
    scorer_minutes: Annotated[float, Field(gt=0, le=limits.MINUTES), NUMBER] = 240.0
    """Minutes that a scorer of `evaluate.scorers` may take for one sample set before it is stopped."""


class Params(Section):
    """A whole params file."""

    seed: Seed
    """Seed of every random number of the pipeline."""
    teacher: Teacher
    prompts: Prompts
    latents: Latents
    schedule: Schedule
    distill: Distill
    sample: Sample
    evaluate: Evaluate
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _enough_samples(self) -> Params:
        pairs = [measure.name for measure in measures.chosen(self.evaluate.metrics) if measure.kind == "pairs"]
        if pairs and self.latents.per_prompt < 2:
            raise ValueError(
                f"evaluate.metrics has {pairs[0]}, which compares pictures of one prompt:"
                " set latents.per_prompt to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        needs = self.distill.losses.needs
        others = sorted(name for name, each in needs.items() if not each.states)
        if self.schedule.ends == "next" and others:
            raise ValueError(
                f"schedule.ends is next, which is for dm alone: give {', '.join(others)} weight 0"
                " (dm.guidance_scale is the guidance there)"
            )
        if self.latents.train_pairs and self.prompts.embed == "online":
            raise ValueError(
                "latents.train_pairs needs the training prompts encoded: set prompts.embed to cached"
            )
        learners = sorted(name for name, each in needs.items() if each.pairs)
        if learners and not self.latents.train_pairs:
            raise ValueError(
                f"distill.losses.{learners[0]} has a weight, but there are no pairs: set latents.train_pairs"
            )
        return self


def parse(values: Any) -> Params:
    """`Params` from plain values, or `ParamsError` with a line for each problem, naming its key."""
    return validated(Params, values)


def validated(kind: type[AnySection], values: Any) -> AnySection:
    """A section from plain values, or `ParamsError` with a line for each problem, naming its key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    lines = [line(_describe(problem, kind)) for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"and {len(problems) - MOST_PROBLEMS:,} more problems")
    raise ParamsError("\n".join(lines))


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Params:
    """`Params` of a YAML file, with the `changes` by dotted key (`{"schedule.max_len": 6}`); raises ParamsError."""
    path = at_home(path)
    values = read_yaml(path)
    try:
        return parse(changed(values, changes) if changes else values)
    except ParamsError as error:
        raise ParamsError("\n".join(f"{path}: {problem}" for problem in str(error).splitlines())) from None


def read_yaml(path: Path, most: int = limits.PARAMS_BYTES) -> Any:
    """The value of a YAML file of up to so many bytes; raises ParamsError in a line that names the file."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise ParamsError(f"{path}: larger than {most:,} bytes: is it the right file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if _depth(text) > limits.DEPTH:
        raise ParamsError(f"{path}: not valid YAML: nested too deeply")
    try:
        return YAML(typ="safe").load(text)
    except RecursionError:
        raise ParamsError(f"{path}: not valid YAML: nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - its own, and what Python says of dates, numbers and keys
        raise ParamsError(line(f"{path}: not valid YAML: {error}")) from None


def _depth(text: str) -> int:
    """The most brackets that are open at once."""
    return max(
        accumulate((letter in "[{") - (letter in "]}") for letter in text if letter in "[]{}"), default=0
    )


def changed(values: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `values` with the `changes` by dotted key; raises ParamsError if one has no place there."""
    if not isinstance(values, Mapping):
        raise ParamsError("the file: holds no sections")
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in changes.items():
        section = result
        *parents, name = key.split(".")
        for parent in parents:
            inner = section.get(parent, {})
            if not isinstance(inner, Mapping):
                raise ParamsError(f"{key}: {parent} is a value, not a section")
            section[parent] = section = dict(inner)
        section[name] = value
    return result


def _describe(problem: Any, kind: type[Section]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_suggestion(problem['loc'], kind)}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case "too_long" if problem["ctx"]["field_type"] == "List":
            return f"{key}: more entries than make sense: at most {problem['ctx']['max_length']:,}"
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{key}: {message}, not {shown(problem['input'])}"


def _suggestion(loc: tuple[Any, ...], kind: type[Section]) -> str:
    """The known keys of the section in which an unknown one was found, somewhere in a section of this `kind`."""
    model: Any = kind
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return ""
        model = field.annotation
    return f" (known here: {', '.join(model.model_fields)})"
