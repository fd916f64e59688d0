"""Every family through the six stages, by DVC itself, in a repository of its own, on a tiny random pipeline."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from cdm.data.sampling import to_bytes
from cdm.data.store import ShardWriter, Store
from cdm.families import get_family
from cdm.models.manifest import TeacherManifest
from cdm.models.student import find_student
from cdm.randomness import sample_noise
from tests import tiny_pipelines
from tests.repository import Repository, make_repository
from tests.tiny_pipelines import AUTOENCODERS, TEXT_TOKENS, family_of, resolution_of

PROMPT = "a red three on black paper"
SETTINGS: dict[str, dict[str, Any]] = {
    "prompts": {"train": ["world/few.txt"], "eval": ["world/some.txt"], "eval_count": 2},
    "latents": {"steps": 2, "per_prompt": 2},
    "distill": {"iterations": 4, "batch_size": 2, "student_every": 2, "fake_only": 0},
    "sample": {"steps": [1, 2], "teacher_steps": [1], "pictures": 1},
    "evaluate": {"judge": None, "real": None, "neighbours": 1},
    "runtime": {"pictures_every": 4},
}


def prepared(
    folder: Path, home: Path, name: str, teacher: Path, lora: bool, precision: str = "fp32"
) -> Repository:
    """The pipeline of the tiny pipeline `name`, not yet run; every stage computes in this precision."""
    repository = make_repository(folder, home, teacher)
    (folder / "world/few.txt").write_text("\n".join([PROMPT, "a blue 'seven'", "a cyan zero on brown paper"]))
    (folder / "world/some.txt").write_text("\n".join(["a pink nine", "a green two on gray paper"]))
    yaml = YAML(typ="safe")
    params = yaml.load((folder / "params.yaml").read_text())
    for section, values in SETTINGS.items():
        params[section].update(values)
    for section in ("prompts", "latents", "distill"):
        params[section]["precision"] = precision
    params["teacher"] |= {"family": family_of(name), "resolution": resolution_of(name), "guidance_scale": 2.0}
    params["prompts"]["max_sequence_length"] = TEXT_TOKENS[name]
    params["distill"]["lora"] = {"rank": 2, "alpha": 4} if lora else None
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return repository


def check(folder: Path, name: str, teacher: Path, lora: bool) -> None:
    """The results of the six stages: all of them there, and a student that draws the same in plain diffusers."""
    quality = json.loads((folder / "metrics/quality.json").read_text())
    assert {row: each["evaluations"] for row, each in quality["student"].items()} == {"steps1": 1, "steps2": 2}
    assert {row: each["evaluations"] for row, each in quality["teacher"].items()} == {"steps1": 2, "steps2": 4}
    assert all(
        row["frechet_distance"] >= 0 for model in ("student", "teacher") for row in quality[model].values()
    )
    with (folder / "logs/distill.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["2", "4"]
    losses = [float(row[f"loss_{term}"]) for row in rows for term in ("fake", "ca", "dm", "cdm")]
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
    assert all(float(row["loss_fake"]) > 0.1 for row in rows)

    manifest = TeacherManifest.read(folder / "data/teacher.json")
    student, sigmas = folder / "models/student", [1.0, 0.5]
    noise = sample_noise(0, [5], manifest.latent_shape)
    pipeline = find_student(student).load()
    family = find_student(student).family
    conditioning = family.encode(pipeline, [PROMPT], TEXT_TOKENS[name])
    ours = family.sample(pipeline, noise, conditioning, conditioning, sigmas, 1.0)
    plain = plain_student(family.pipeline_class_name, student, teacher, lora)
    theirs = tiny_pipelines.call(name, plain, [PROMPT], noise, sigmas)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)
    unlearnt = family.sample(family.load_pipeline(teacher), noise, conditioning, conditioning, sigmas, 1.0)
    assert not torch.equal(unlearnt, ours), "the student has learnt something"


def plain_student(pipeline_class: str, student: Path, teacher: Path, lora: bool) -> Any:
    """The student as one loads it with diffusers alone."""
    import diffusers

    folder = teacher if lora else student
    index = json.loads((folder / "model_index.json").read_text())
    absent = [part for part, value in index.items() if isinstance(value, list) and value[0] is None]
    pipeline = getattr(diffusers, pipeline_class).from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.scheduler.register_to_config(shift_terminal=None)
        loader = getattr(pipeline, "load_lora_weights", pipeline.transformer.load_lora_adapter)
        loader(student, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora", "precision"),
    [
        pytest.param("sd3_t5", False, "fp32", marks=pytest.mark.nightly),
        pytest.param("sd3_real", False, "fp32", marks=pytest.mark.nightly),
        pytest.param("sd3_real", True, "bf16", marks=pytest.mark.nightly),
        ("longcat", False, "bf16"),
        ("longcat", True, "fp32"),  # its pipeline has no loader of LoRAs
        ("flux", True, "bf16"),
        ("qwen_image", False, "bf16"),
        ("z_image", False, "bf16"),
    ],
)
def test_six_stages(
    tiny_pipeline: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    lora: bool,
    precision: str,
) -> None:
    repository = prepared(tmp_path / "pipeline", tmp_path / "home", name, tiny_pipeline(name), lora, precision)
    assert repository.stages_run("repro") == ["teacher", "prompts", "latents", "distill", "sample", "evaluate"]
    monkeypatch.chdir(repository.folder)  # where a LoRA's teacher is found
    check(repository.folder, name, tiny_pipeline(name), lora)
    assert repository.changed() == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly][: name != "sd3"]) for name in AUTOENCODERS]
)
def test_pictures_of_a_batch_are_written_by_autoencoders_of_published_shapes(tmp_path: Path, name: str) -> None:
    """Some leave a batch of pictures channels last in memory, which small ones do not."""
    autoencoder, latents = AUTOENCODERS[name]().eval(), torch.randn(2, 16, 4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        decoded = get_family(name).decode(SimpleNamespace(vae=autoencoder.to(dtype)), latents)
        pictures = to_bytes(decoded)
        assert pictures.shape == (2, 3, 32, 32)
        with ShardWriter(tmp_path / "store", 2, {}) as writer:
            writer.append({"images": pictures})
        assert torch.equal(Store(tmp_path / "store").all()["images"], pictures)
