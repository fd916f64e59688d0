"""The loop: exact resuming whatever stops it, one run at a time, the same batch over any number of processes."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from cdm.data import prompts, sampling
from cdm.errors import CdmError
from cdm.models.manifest import TeacherManifest, describe
from cdm.params import Params, load
from cdm.training.loop import Inputs, check_finite, distill, fingerprint

ITERATIONS = 40


def write_params(folder: Path, teacher: Path, **distill_changes: Any) -> Params:
    lists = folder / "train.txt"
    lists.write_text(
        "".join(f"a {ink} three on black paper\n" for ink in ("red", "green", "blue", "pink", "cyan"))
    )
    values: dict[str, Any] = {
        "seed": 5,
        "teacher": {"family": "sd3", "source": str(teacher), "guidance_scale": 2.0},
        "prompts": {"train": [str(lists)], "eval_count": 1, "max_sequence_length": 0},
        "latents": {"steps": 2, "per_prompt": 1},
        "schedule": {"kind": "dynamic", "min_len": 1, "max_len": 4, "sigma_min": 0.1, "sigma_max": 0.9},
        "distill": {
            "iterations": ITERATIONS,
            "batch_size": 4,
            "fake_only": 4,
            "losses": {
                "ca": {"weight": 1.0, "scale": 1.0},
                "dm": {"weight": 1.0},
                "cdm": {"weight": 1.0},
            },
            "student": {"lr": 1e-3, "warmup": 4, "decay_from": 0.5},
            "fake": {"lr": 1e-3, "warmup": 4},
            **distill_changes,
        },
        "sample": {"steps": [1], "teacher_steps": [1]},
        "evaluate": {},
        "runtime": {"device": "cpu", "checkpoint_every": 4, "pictures_every": 0},
    }
    YAML().dump(values, folder / "params.yaml")
    return load(folder / "params.yaml")


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of a distillation of the tiny teacher."""
    folder = tmp_path_factory.mktemp("world")
    params = write_params(folder, tiny_sd3)
    manifest = describe("sd3", str(tiny_sd3), None)
    manifest.write(folder / "teacher.json")
    prompts.build(params, manifest, folder / "prompts")
    return folder


def gather(world: Path, params: Params) -> Inputs:
    return Inputs.gather(params, TeacherManifest.read(world / "teacher.json"), world / "prompts")


def run(world: Path, out: Path, params: Params | None = None) -> dict[str, torch.Tensor]:
    """A distillation in this process; returns the student's weights."""
    params = params or load(world / "params.yaml")
    distill(params, gather(world, params), checkpoints=out / "ck", student=out / "student", log=out / "log.csv")
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    run(world, out)
    return out


def start(world: Path, out: Path, checkpoints: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.run_distill", str(world), str(out), str(checkpoints)],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same(out: Path, expected: Path) -> None:
    mine, theirs = weights(out), weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (out / "log.csv").read_bytes() == (expected / "log.csv").read_bytes()


def test_student_loads_differs_from_the_teacher_and_leaves_no_checkpoint(uninterrupted: Path, tiny_sd3: Path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        uninterrupted / "student", text_encoder_3=None, tokenizer_3=None
    )
    assert pipeline.transformer.dtype == torch.float32
    teacher = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    student = weights(uninterrupted)
    assert student.keys() == teacher.keys()
    assert any((student[name] - teacher[name]).abs().max() > 1e-4 for name in teacher)
    assert list((uninterrupted / "ck").iterdir()) == []


def test_log_has_a_row_a_round_with_blanks_where_the_student_rests(uninterrupted: Path):
    rows = read_log(uninterrupted)
    assert [int(row["iteration"]) for row in rows] == list(range(2, ITERATIONS + 1, 2))
    assert all(row["loss_fake"] for row in rows)
    assert [bool(row["loss_cdm"]) for row in rows] == [False] * 2 + [True] * (len(rows) - 2)


def test_resumes_bit_for_bit_after_a_crash(world: Path, uninterrupted: Path, tmp_path: Path, monkeypatch):
    from cdm.training.distiller import Distiller

    real, crash_at = Distiller.round, [10, 22, 24]

    def round_or_crash(self: Distiller, iteration: int) -> dict[str, float]:
        if crash_at and iteration == crash_at[0]:
            raise RuntimeError(f"crash {crash_at.pop(0)}")
        return real(self, iteration)

    monkeypatch.setattr(Distiller, "round", round_or_crash)
    for expected in (10, 22, 24):
        with pytest.raises(RuntimeError, match=f"crash {expected}"):
            run(world, tmp_path)
    run(world, tmp_path)
    assert_same(tmp_path, uninterrupted)


def test_resumes_bit_for_bit_after_sigkill_at_any_moment(world: Path, uninterrupted: Path, tmp_path: Path):
    """Killed three times at random moments of its life, then left to finish."""
    moments = random.Random()
    for _ in range(3):
        process = start(world, tmp_path, tmp_path / "ck")
        folder = tmp_path / "ck"
        before = set(folder.glob("*/step-*"))
        while set(folder.glob("*/step-*")) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.communicate()
    process = start(world, tmp_path, tmp_path / "ck")
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert_same(tmp_path, uninterrupted)


def test_sigterm_saves_and_exits_with_its_code(world: Path, uninterrupted: Path, tmp_path: Path):
    process = start(world, tmp_path, tmp_path / "ck")
    while not list((tmp_path / "ck").glob("*/step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (128 + signal.SIGTERM, 0)  # 0: it was done before the signal arrived
    if process.returncode:
        assert not (tmp_path / "student").exists()
        assert len(list((tmp_path / "ck").glob("*/step-*"))) in (1, 2)
        again = start(world, tmp_path, tmp_path / "ck")
        again.communicate()
        assert again.returncode == 0
    assert_same(tmp_path, uninterrupted)


def test_two_processes_share_the_batch_of_one(world: Path, uninterrupted: Path, tmp_path: Path):
    """Over gloo: the same samples, so the same losses and student to rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        start(world, tmp_path, tmp_path / "ck", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in (0, 1)
    ]
    for process in ranks:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    one, two = read_log(uninterrupted), read_log(tmp_path)
    assert len(one) == len(two)
    for mine, theirs in zip(two[:8], one[:8], strict=True):
        for name in ("loss_fake", "loss_dm", "loss_ca", "loss_cdm"):
            if theirs[name]:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3)
    mine, theirs = weights(tmp_path), weights(uninterrupted)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-3, rtol=1e-2)


def test_fingerprint_follows_what_matters_and_nothing_else(world: Path):
    params = load(world / "params.yaml")
    inputs = gather(world, params)
    same = params.model_copy(update={"runtime": params.runtime.model_copy(update={"checkpoint_every": 9})})
    other = params.model_copy(update={"seed": 6})
    assert fingerprint(same, inputs) == fingerprint(params, inputs)
    assert fingerprint(other, inputs) != fingerprint(params, inputs)
    assert fingerprint(params, replace(inputs, digests=["other data"])) != fingerprint(params, inputs)


def test_divergence_names_the_term():
    with pytest.raises(CdmError, match=r"loss_cdm not finite in the round at iteration 12"):
        check_finite({"loss_cdm": float("nan"), "loss_dm": 1.0}, 12)


def test_divergence_keeps_the_last_checkpoint(world: Path, tmp_path: Path, monkeypatch):
    from cdm.training.distiller import Distiller

    real = Distiller.round

    def diverge(self: Distiller, iteration: int) -> dict[str, float]:
        metrics = real(self, iteration)
        return metrics | ({"loss_dm": float("inf")} if iteration == 10 else {})

    monkeypatch.setattr(Distiller, "round", diverge)
    with pytest.raises(CdmError, match="loss_dm"):
        run(world, tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("ck/*/step-*"))] == ["step-00000004", "step-00000008"]


def test_batch_that_does_not_divide_is_refused_before_anything_loads(world: Path, tmp_path: Path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(CdmError, match="batch_size 4 does not divide over 3 processes"):
        run(world, tmp_path)


def test_a_regression_learns_from_pairs_of_these_prompts_and_this_teacher(
    world: Path, tiny_sd3: Path, tmp_path: Path
):
    """A student without a fake score: its regression falls, its checkpoints are whole, others' pairs are refused."""
    (tmp_path / "world").mkdir()
    pairs = world / "pairs"
    terms = {name: {"weight": 0.0} for name in ("dm", "cdm")} | {"ca": {"weight": 0.0, "scale": 0.0}}
    terms |= {"regression": {"weight": 1.0}}
    values = YAML(typ="safe").load((world / "params.yaml").read_text())
    values["latents"]["train_pairs"] = 6
    values["distill"] |= {"losses": terms, "student_every": 1, "fake_only": 0, "iterations": 24}
    values["schedule"] |= {"kind": "fixed", "sigmas": [1.0]}
    YAML().dump(values, tmp_path / "world" / "params.yaml")
    params = load(tmp_path / "world" / "params.yaml")
    teacher = TeacherManifest.read(world / "teacher.json")
    sampling.cache_training_pairs(params, teacher, world / "prompts", pairs)
    run(world, tmp_path, params)
    losses = [float(row["loss_regression"]) for row in read_log(tmp_path)]
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    manifest = json.loads((pairs / "manifest.json").read_text())
    manifest["metadata"]["teacher"] = "another"
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CdmError, match="drawn for another teacher or other prompts"):
        gather(world, params)
