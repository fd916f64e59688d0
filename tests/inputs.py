"""What the stages `prompts`, `latents` and `sample` write, by the functions that they call, for given parameters."""

from __future__ import annotations

from pathlib import Path

from cdm.data import prompts, sampling
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.training.inputs import Inputs
from cdm.training.loop import distill
from cdm.training.watch import Places


def build_prompts(params: Params, teacher: TeacherManifest, out: Path) -> prompts.PromptsReport:
    return prompts.build(params.prompts, teacher, out, seed=params.seed, runtime=params.runtime)


def cache_latents(params: Params, teacher: TeacherManifest, prompts: Path, out: Path) -> None:
    scale = params.teacher.guidance_scale
    sampling.cache_teacher_latents(
        params.latents, teacher, prompts, out, seed=params.seed, guidance_scale=scale, runtime=params.runtime
    )


def cache_pairs(params: Params, teacher: TeacherManifest, prompts: Path, out: Path) -> None:
    scale = params.teacher.guidance_scale
    sampling.cache_training_pairs(
        params.latents, teacher, prompts, out, seed=params.seed, guidance_scale=scale, runtime=params.runtime
    )


def draw_samples(
    params: Params, teacher: TeacherManifest, student: Path, prompts: Path, latents: Path, out: Path
) -> None:
    sampling.draw_samples(params.sample, teacher, student, prompts, latents, out, runtime=params.runtime)


def train(params: Params, inputs: Inputs, out: Path, *, watched: bool = False) -> None:
    """A distillation in this process: checkpoints, student and log go below `out`, and where it is `watched` pictures
    and times as well."""
    places = Places(out / "pictures", out / "timing.json", out / "trackers") if watched else None
    distill(params, inputs, checkpoints=out / "ck", student=out / "student", log=out / "log.csv", places=places)
