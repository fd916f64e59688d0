"""The loop: exact resuming whatever stops it, one run at a time, the same batch over any number of processes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ruamel.yaml import YAML
from safetensors.torch import load_file

from cdm.data.prompt_set import OnlinePrompts, PromptSet
from cdm.errors import CdmError
from cdm.families import Family, get_family
from cdm.models.manifest import TeacherManifest, describe
from cdm.params import Params, load
from cdm.training.distiller import Distiller
from cdm.training.identity import fingerprint
from cdm.training.inputs import Inputs, prompt_source
from cdm.training.networks import FullNetworks
from cdm.training.setup import prepare
from cdm.training.state import check_finite
from stages import common
from tests.crashing import crash_rounds
from tests.inputs import build_prompts, cache_pairs, train
from tests.launching import Started, succeed_in_two_processes
from tests.write_params import ITERATIONS, write_params


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of a distillation of the tiny teacher."""
    folder = tmp_path_factory.mktemp("world")
    params = write_params(folder, tiny_sd3)
    manifest = describe("sd3", str(tiny_sd3), None)
    manifest.write(folder / "teacher.json")
    build_prompts(params, manifest, folder / "prompts")
    return folder


def gather(world: Path, params: Params) -> Inputs:
    return Inputs.gather(params, TeacherManifest.read(world / "teacher.json"), world / "prompts")


def run(world: Path, out: Path, params: Params | None = None) -> dict[str, torch.Tensor]:
    """A distillation in this process; returns the student's weights."""
    params = params or load(world / "params.yaml")
    train(params, gather(world, params), out)
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


def start(world: Path, out: Path) -> Started:
    return Started("tests.run_distill", world, out, out / "ck")


def assert_same(out: Path, expected: Path) -> None:
    mine, theirs = weights(out), weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (out / "log.csv").read_bytes() == (expected / "log.csv").read_bytes()


def test_student_loads_and_differs_from_the_teacher(uninterrupted: Path, tiny_sd3: Path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        uninterrupted / "student", text_encoder_3=None, tokenizer_3=None
    )
    assert pipeline.transformer.dtype == torch.float32
    teacher = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    student = weights(uninterrupted)
    assert student.keys() == teacher.keys()
    assert any((student[name] - teacher[name]).abs().max() > 1e-4 for name in teacher)


def test_a_finished_student_that_was_lost_is_written_again_without_training(
    world: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after a kill, or a full disk, while DVC copies the student into its cache: it deletes outs before a stage."""

    def refuse(self: Distiller, iteration: int) -> dict[str, float]:
        raise AssertionError(f"it trains again, at iteration {iteration}")

    pictures = tmp_path / "pictures"
    params = load(world / "params.yaml")
    params = params.model_copy(update={"runtime": params.runtime.model_copy(update={"pictures_every": 16})})

    def trained() -> dict[str, bytes]:
        train(params, gather(world, params), tmp_path, watched=True)
        files = [*(tmp_path / "student").rglob("*"), *pictures.iterdir(), tmp_path / "log.csv"]
        return {str(path): path.read_bytes() for path in files if path.is_file()}

    # Numbers in the place of the log's curves, which take longer to draw than the training takes.
    monkeypatch.setattr("cdm.training.pictures.losses", lambda curves: repr(curves).encode())
    first = trained()
    assert sum(name.endswith(".png") for name in first) > 1
    for lost in (tmp_path / "student", pictures):
        shutil.rmtree(lost)
    (tmp_path / "log.csv").unlink()
    monkeypatch.setattr(Distiller, "round", refuse)
    assert trained() == first
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("stage", "cached", "goes"), [("sample", True, True), ("sample", False, False), (None, True, False)]
)
def test_checkpoints_go_when_dvc_has_the_student(
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str | None,
    cached: bool,
    goes: bool,
):
    """Not before, as after a kill and `dvc repro -s sample`, and not by a stage without DVC."""
    shutil.copytree(uninterrupted / "ck", tmp_path / "ck")
    shutil.copytree(uninterrupted / "student", tmp_path / "student")
    (folder,) = (tmp_path / "ck").iterdir()
    torn = tmp_path / "ck/.distill-0.removed"
    torn.mkdir()
    monkeypatch.setattr(common, "CHECKPOINTS", tmp_path / "ck")
    monkeypatch.setattr(common, "is_committed", lambda record: cached and record.name == "student.json")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if stage is not None:
        monkeypatch.setenv("DVC_STAGE", stage)
    common.give_back_checkpoints(tmp_path / "none")
    assert folder.exists()
    common.give_back_checkpoints(tmp_path / "student")
    assert folder.exists() != goes
    assert torn.exists() == (stage is None)
    common.give_back_checkpoints(tmp_path / "student")  # nothing is there any more, or it is left again


def test_log_has_a_row_a_round_with_blanks_where_the_student_rests(uninterrupted: Path):
    rows = read_log(uninterrupted)
    assert [int(row["iteration"]) for row in rows] == list(range(2, ITERATIONS + 1, 2))
    assert all(row["loss_fake"] for row in rows)
    assert [bool(row["loss_cdm"]) for row in rows] == [False] * 2 + [True] * (len(rows) - 2)


def test_resumes_bit_for_bit_after_a_crash(world: Path, uninterrupted: Path, tmp_path: Path, monkeypatch):
    crash_rounds(monkeypatch, 6, 14, 16)
    for expected in (6, 14, 16):
        with pytest.raises(RuntimeError, match=f"crash {expected}"):
            run(world, tmp_path)
    run(world, tmp_path)
    assert_same(tmp_path, uninterrupted)


def test_resumes_bit_for_bit_after_sigkill_at_any_moment(world: Path, uninterrupted: Path, tmp_path: Path):
    """Killed after each of two checkpoints, at once and a little later, then left to finish."""
    for seconds in (0.0, 0.05):
        process, folder = start(world, tmp_path), tmp_path / "ck"
        before = set(folder.glob("*/step-*"))
        while set(folder.glob("*/step-*")) == before and process.runs:
            time.sleep(0.001)
        time.sleep(seconds)
        process.send(signal.SIGKILL)
        code, errors = process.finish()
        assert code in (-signal.SIGKILL, 0), errors  # 0: it was done before the signal arrived
    code, errors = start(world, tmp_path).finish()
    assert code == 0, errors
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_code(
    world: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    """The signal comes in a round that does not end at a checkpoint."""
    real = Distiller.round

    def round_with_signal(self: Distiller, iteration: int) -> dict[str, float]:
        if iteration == 8:
            signal.raise_signal(number)
        return real(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "round", round_with_signal)
        with pytest.raises(SystemExit) as stopped:
            run(world, tmp_path)
    assert stopped.value.code == 128 + number
    assert not (tmp_path / "student").exists()
    steps = [path.name for path in sorted(tmp_path.glob("ck/*/step-*"))]
    assert steps[-1] == "step-00000010"
    run(world, tmp_path)
    assert_same(tmp_path, uninterrupted)


def test_two_processes_share_the_batch_of_one(world: Path, uninterrupted: Path, tmp_path: Path):
    """Over gloo: the same samples, so the same losses and student to rounding."""
    succeed_in_two_processes("tests.run_distill", world, tmp_path, tmp_path / "ck")
    one, two = read_log(uninterrupted), read_log(tmp_path)
    assert len(one) == len(two)
    for mine, theirs in zip(two[:8], one[:8], strict=True):
        for name in ("loss_fake", "loss_dm", "loss_ca", "loss_cdm"):
            if theirs[name]:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3)
    mine, theirs = weights(tmp_path), weights(uninterrupted)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
def test_prompts_that_are_not_stored_are_encoded_once_a_round(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollouts: str
):
    """In parts, as the networks take them; the encoders, which wait on the CPU, come and go once for all of them."""
    changes = {"iterations": 8, "rollouts": rollouts}
    students, manifest = {}, describe("sd3", str(tiny_sd3), None)
    real, encoded = OnlinePrompts.encoded, []
    family, texts = type(get_family("sd3")), []
    real_encode = family.encode

    def watched(
        self: OnlinePrompts, indices: list[int], device: torch.device | None, at_once: int
    ) -> dict[str, torch.Tensor]:
        texts.clear()
        found = real(self, indices, device, at_once)
        encoded.append((len(indices), [*texts]))
        return found

    def encode(self: Family, pipeline: object, prompts: list[str], length: int | None = None) -> object:
        texts.append(len(prompts))
        return real_encode(self, pipeline, prompts, length)

    monkeypatch.setattr(OnlinePrompts, "encoded", watched)
    monkeypatch.setattr(family, "encode", encode)
    for embed in ("cached", "online"):
        folder = tmp_path / embed
        folder.mkdir()
        params = write_params(folder, tiny_sd3, **changes)
        params = params.model_copy(
            update={
                "prompts": params.prompts.model_copy(update={"embed": embed}),
                "runtime": params.runtime.model_copy(update={"micro_batch": 3, "offload_encoders": True}),
            }
        )
        build_prompts(params, manifest, folder / "prompts")
        train(params, Inputs.gather(params, manifest, folder / "prompts"), folder)
        students[embed] = weights(folder)
    rounds, samples = 4, 4
    if rollouts == "shared":
        assert encoded == [(samples, [3, 1])] * rounds
    else:
        assert encoded == [(2 * samples, [3, 3, 2])] * rounds
    for name, value in students["cached"].items():
        torch.testing.assert_close(students["online"][name], value, atol=2e-4, rtol=1e-3)


def test_what_saves_work_changes_no_bit(world: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights cast once a rollout, and the student's graph at the anchor kept, in bf16 with gradient checkpointing."""
    params = load(world / "params.yaml")
    distill = params.distill.model_copy(
        update={"precision": "bf16", "gradient_checkpointing": True, "fake_only": 0}
    )
    params = params.model_copy(update={"distill": distill})

    def after_a_round() -> dict[str, torch.Tensor]:
        _, distiller = prepare(params, gather(world, params), Accelerator(cpu=True))
        measured = distiller.round(0)
        assert {"loss_ca", "loss_dm", "loss_cdm"} <= measured.keys(), measured
        learners = {"student": distiller.student, "fake": distiller.fake}
        return {
            f"{role} {name}": value.detach().clone()
            for role, learner in learners.items()
            for name, value in learner.parameters.items()
        }

    expected = after_a_round()
    casts, kept = [], []

    def cast_each_time(self: Any) -> Any:
        casts.append(self)
        return nullcontext()

    def forget_graph(self: Distiller, iteration: int, *rest: Any) -> Any:
        anchor = roll_out(self, iteration, *rest)
        kept.append(anchor.keeps_graph)
        anchor.keeps_graph = False
        return anchor

    roll_out = Distiller.roll_out
    monkeypatch.setattr(FullNetworks, "casting_once", cast_each_time)
    monkeypatch.setattr(Distiller, "roll_out", forget_graph)
    found = after_a_round()
    assert casts
    assert any(kept)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
def test_every_prompt_comes_once_an_epoch(world: Path, rollouts: str, monkeypatch: pytest.MonkeyPatch):
    """Four prompts, three samples a rollout: twelve samples are three epochs, also where a round has one rollout."""
    params = load(world / "params.yaml")
    inputs = gather(world, params)
    distill = params.distill.model_copy(update={"rollouts": rollouts, "batch_size": 3})
    asked: list[int] = []
    monkeypatch.setattr(
        PromptSet, "conditioning", lambda self, indices, device=None: asked.extend(indices) or {}
    )
    assert len(inputs.prompts) == 4
    source = prompt_source(inputs, 0, distill, range(3), torch.device("cpu"), 3)
    every = distill.student_every if rollouts == "shared" else 1
    for iteration in range(0, 4 * every, every):
        source(iteration, range(3))
    assert [sorted(asked[start : start + 4]) for start in range(0, 12, 4)] == [[0, 1, 2, 3]] * 3


def test_a_guided_teacher_is_guided_by_its_family(world: Path):
    params = load(world / "params.yaml")
    inputs = gather(world, params)
    _, distiller = prepare(params, inputs, Accelerator(cpu=True))
    assert distiller.guide == inputs.family.guide


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
    cache_pairs(params, teacher, world / "prompts", pairs)
    run(world, tmp_path, params)
    losses = [float(row["loss_regression"]) for row in read_log(tmp_path)]
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    manifest = json.loads((pairs / "manifest.json").read_text())
    manifest["metadata"]["teacher"] = "another"
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CdmError, match="drawn for another teacher or other prompts"):
        gather(world, params)
