"""The code that shapes the numbers of each stage: one list, for dvc.yaml and for the fingerprints of experiments.

A change of a listed module makes the stage stale, and nothing that an interrupted run has left is taken across it. What
a stage imports besides is in `SHAPES_NOTHING`: it may change without costing a training. A module that is new to a
stage goes into one of the two, and into the stage's `deps` in dvc.yaml (tests/test_dvc.py compares all three).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from cdm.system.files import digest_of, sha256

ROOT = Path(__file__).parents[2]
THE_FAMILY = "cdm/families/${teacher.family}.py"
"""The module of the one architecture that a run loads, as dvc.yaml names it."""
FAMILY = (
    "cdm/families/__init__.py",
    "cdm/families/base.py",
    "cdm/families/common.py",
    "cdm/families/configs.py",
    "cdm/families/folder.py",
    "cdm/families/tensor_form.py",
    "cdm/families/weights.py",
    THE_FAMILY,
)
DRAWING = (
    "cdm/data/prompt_set.py",
    "cdm/data/reference.py",
    "cdm/data/sampling.py",
    "cdm/data/spread.py",
    "cdm/data/store.py",
    "cdm/flow.py",
    "cdm/models/student.py",
    "cdm/randomness.py",
)
STAGES: dict[str, tuple[str, ...]] = {
    "teacher": (
        *FAMILY,
        "cdm/external.py",
        "cdm/models/manifest.py",
        "cdm/models/parts.py",
        "cdm/models/use.py",
        "stages/teacher.py",
    ),
    "prompts": (
        *FAMILY,
        "cdm/data/prompt_formats.py",
        "cdm/data/prompt_lists.py",
        "cdm/data/prompts.py",
        "cdm/data/store.py",
        "cdm/randomness.py",
        "stages/prompts.py",
    ),
    "latents": (*FAMILY, *DRAWING, "stages/latents.py"),
    "distill": (
        *FAMILY,
        "cdm/consistency.py",
        "cdm/data/prompt_set.py",
        "cdm/data/reference.py",
        "cdm/data/store.py",
        "cdm/evaluation/distances.py",
        "cdm/evaluation/looks.py",
        "cdm/flow.py",
        "cdm/losses.py",
        "cdm/models/student.py",
        "cdm/randomness.py",
        "cdm/rollout.py",
        "cdm/schedule.py",
        "cdm/training/compiling.py",
        "cdm/training/distiller.py",
        "cdm/training/inputs.py",
        "cdm/training/loop.py",
        "cdm/training/networks.py",
        "cdm/training/optim.py",
        "cdm/training/points.py",
        "cdm/training/probe.py",
        "cdm/training/quantised.py",
        "cdm/training/saving.py",
        "cdm/training/setup.py",
        "cdm/training/sharding.py",
        "cdm/training/start.py",
        "cdm/training/state.py",
        "cdm/training/terms.py",
        "stages/distill.py",
    ),
    "sample": (*FAMILY, *DRAWING, "stages/sample.py"),
    "evaluate": (
        *FAMILY,  # for the code that its report shows
        "cdm/data/prompt_set.py",
        "cdm/data/spread.py",
        "cdm/data/store.py",
        "cdm/evaluation/bootstrap.py",
        "cdm/evaluation/distances.py",
        "cdm/evaluation/drift.py",
        "cdm/evaluation/feature_sets.py",
        "cdm/evaluation/features.py",
        "cdm/evaluation/judge.py",
        "cdm/evaluation/looks.py",
        "cdm/evaluation/making.py",
        "cdm/evaluation/metrics.py",
        "cdm/evaluation/models/base.py",
        "cdm/evaluation/models/clip.py",
        "cdm/evaluation/models/dinov2.py",
        "cdm/evaluation/models/inception.py",
        "cdm/evaluation/models/lpips.py",
        "cdm/evaluation/page.html.j2",
        "cdm/evaluation/page.py",
        "cdm/evaluation/plots.py",
        "cdm/evaluation/quality.py",
        "cdm/evaluation/report.html.j2",
        "cdm/evaluation/report.py",
        "cdm/evaluation/results.py",
        "cdm/evaluation/samples.py",
        "cdm/evaluation/scorers.py",
        "cdm/evaluation/sheets.py",
        "cdm/evaluation/theme.py",
        "cdm/experiments/headline.py",
        "cdm/flow.py",
        "cdm/handover/snippet.py",
        "cdm/measures.py",
        "cdm/models/student.py",
        "cdm/planning/forwards.py",
        "cdm/randomness.py",
        "stages/evaluate.py",
    ),
}
"""Files by stage, relative to the repository."""

SHAPES_NOTHING = (
    "cdm/__init__.py",
    "cdm/external.py",  # its answers are the files in data/inputs, which stages depend on
    "cdm/data/prompt_formats.py",  # to the stage teacher
    "cdm/data/prompt_lists.py",  # to the stage teacher, which only checks that they can be read
    "cdm/data/prompt_set.py",  # to the stage prompts
    "cdm/errors.py",
    "cdm/limits.py",
    "cdm/measures.py",  # to other stages than evaluate, which only check names
    "cdm/models/metric_models.py",  # where models are; which ones, is in data/inputs/evaluation.json
    "cdm/models/hps.py",  # what it makes is hashed like other models
    "cdm/models/published.py",  # where models come from
    "cdm/models/hub.py",  # where a model is; which one it is, is in data/teacher.json
    "cdm/models/manifest.py",  # its answer is data/teacher.json
    "cdm/models/parts.py",  # its answer is that the stage teacher ends well
    "cdm/models/use.py",  # the same
    "cdm/params.py",  # every value stands in the params file
    "cdm/preflight.py",
    "cdm/system/boundary.py",
    "cdm/system/circumstances.py",
    "cdm/system/commands.py",
    "cdm/system/device.py",
    "cdm/system/environment.py",
    "cdm/system/files.py",
    "cdm/system/git.py",
    "cdm/system/guard.py",
    "cdm/system/host.py",
    "cdm/system/launcher.py",
    "cdm/system/lock.py",
    "cdm/system/parent.py",
    "cdm/system/places.py",
    "cdm/system/problems.py",
    "cdm/system/processes.py",
    "cdm/system/programs.py",
    "cdm/system/progress.py",
    "cdm/system/provenance.py",
    "cdm/system/records.py",
    "cdm/system/signals.py",
    "cdm/system/writing.py",
    "cdm/training/checkpoint.py",
    "cdm/training/identity.py",
    "cdm/training/pictures.py",
    "cdm/training/saver.py",
    "cdm/training/slices.py",
    "cdm/training/tensor_file.py",
    "cdm/training/watch.py",
    "stages/__init__.py",
    "stages/common.py",
)
"""Modules that stages import and that make none of them stale, but for those that list them above."""


def code_files(stage: str, family: str) -> list[str]:
    """Files whose change makes another result of a stage, relative to the repository."""
    return [name.replace(THE_FAMILY, f"cdm/families/{family}.py") for name in STAGES[stage]]


def code_digest(stage: str, family: str) -> str:
    """Hash of the package's code that shapes a stage's numbers, and of the version of diffusers, which draws and
    learns: tells whether an interrupted run had the same."""
    files = {name: sha256(ROOT / name) for name in code_files(stage, family) if name.startswith("cdm/")}
    return digest_of([files, version("diffusers")])
