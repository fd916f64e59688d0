"""LoRA: three roles in one model, saved as diffusers loads it, resumed as exactly as everything else."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cdm.data import sampling
from cdm.data.prompt_set import PromptSet
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.handover import drawing
from cdm.models.manifest import TeacherManifest, describe
from cdm.models.student import LORA as RECORD
from cdm.models.student import Origin, find_student
from cdm.params import Lora, Params
from cdm.randomness import picture_noise
from cdm.training import checkpoint
from cdm.training.inputs import Inputs
from cdm.training.networks import FullNetworks, LoraNetworks
from cdm.training.setup import build_networks
from tests.crashing import crash_rounds
from tests.inputs import build_prompts, cache_latents, draw_samples, train
from tests.test_training import run
from tests.write_params import write_params

FAMILY = get_family("sd3")
LORA = Lora(rank=3, alpha=12)
WEIGHTS = "pytorch_lora_weights.safetensors"


def build(teacher: Path, **options: Any) -> LoraNetworks:
    return LoraNetworks(FAMILY, FAMILY.load_transformer(teacher), LORA, seed=1, **options)


def trained(networks: LoraNetworks) -> LoraNetworks:
    """The networks as after some training: no factor is zero, student and fake score differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in ("student", "fake"):
            for value in networks.parameters(role).values():
                value.copy_(torch.randn(value.shape, generator=generator) / 4)
    return networks


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 8, 64, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
    }
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.9, 0.4]), conditioning


def test_all_roles_start_as_the_teacher_and_the_teacher_stays(tiny_sd3: Path, points: Any) -> None:
    networks = build(tiny_sd3)
    with torch.no_grad():
        teacher = FAMILY.velocity(FAMILY.load_transformer(tiny_sd3), *points)
        for role in ("teacher", "student", "fake"):
            assert torch.equal(networks.velocity(role, *points), teacher)
        trained(networks)
        changed = [networks.velocity(role, *points) for role in ("student", "fake")]
        assert torch.equal(networks.velocity("teacher", *points), teacher)
    assert (changed[0] - teacher).abs().mean() > 1e-2
    assert (changed[0] - changed[1]).abs().mean() > 1e-2


def test_roles_learn_alike_named_adapters_that_start_equal(tiny_sd3: Path) -> None:
    networks = build(tiny_sd3)
    student, fake = networks.parameters("student"), networks.parameters("fake")
    assert list(student) == list(fake)
    assert all(torch.equal(student[name], fake[name]) for name in student)
    assert all((value == 0).all() == (".lora_B." in name) for name, value in student.items())
    mine = {id(value) for role in (student, fake) for value in role.values()}
    assert len(mine) == 2 * len(student)
    assert {id(p) for p in networks.model.parameters() if p.requires_grad} == mine
    torch.manual_seed(99)
    again = build(tiny_sd3).parameters("student")
    assert all(torch.equal(again[name], student[name]) for name in student), "the seed of the run, not torch's"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_reach_their_role_whatever_was_asked_meanwhile(
    tiny_sd3: Path, points: Any, gradient_checkpointing: bool
) -> None:
    """As in a round: the student's graph waits while the fake score learns and the teacher is asked."""
    networks = trained(build(tiny_sd3, gradient_checkpointing=gradient_checkpointing))
    expected = {}
    for role in ("student", "fake"):
        networks.velocity(role, *points).square().sum().backward()
        expected[role] = {name: value.grad for name, value in networks.parameters(role).items()}
        assert all(gradient is not None for gradient in expected[role].values())
        for value in networks.parameters(role).values():
            value.grad = None

    of_student = networks.velocity("student", *points).square().sum()
    of_fake = networks.velocity("fake", *points).square().sum()
    with torch.no_grad():
        networks.velocity("teacher", *points)
    networks.backward("fake", of_fake)
    assert all(value.grad is None for value in networks.parameters("student").values())
    with torch.no_grad():
        networks.velocity("teacher", *points)
    networks.backward("student", of_student)
    for role in ("student", "fake"):
        for name, value in networks.parameters(role).items():
            torch.testing.assert_close(value.grad, expected[role][name], atol=1e-5, rtol=1e-4)


def test_bf16_is_for_the_arithmetic_and_the_frozen_weights(tiny_sd3: Path, points: Any) -> None:
    networks = trained(build(tiny_sd3, autocast=torch.bfloat16))
    learnt = {id(value) for role in ("student", "fake") for value in networks.parameters(role).values()}
    dtypes = {(value.dtype, id(value) in learnt) for value in networks.model.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}
    velocity = networks.velocity("student", *points)
    assert velocity.dtype == torch.float32
    networks.backward("student", velocity.square().sum())
    assert {value.grad.dtype for value in networks.parameters("student").values()} == {torch.float32}
    exact = trained(build(tiny_sd3)).velocity("student", *points)
    torch.testing.assert_close(velocity, exact, atol=0.1, rtol=0.1)


def test_memory_is_that_of_one_model(tiny_sd3: Path) -> None:
    def count(modules: Any) -> int:
        return sum(value.numel() for module in modules for value in module.parameters())

    full = count(FullNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3)).models.values())
    networks = build(tiny_sd3)
    adapters = sum(
        value.numel() for role in ("student", "fake") for value in networks.parameters(role).values()
    )
    assert count([networks.model]) == full / 3 + adapters


def plain_pipeline(teacher: Path, lora: Path | dict[str, Tensor]) -> Any:
    """Teacher and LoRA as a user of diffusers loads them."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(teacher, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_saved_student_is_the_trained_one_in_plain_diffusers(
    tiny_sd3: Path, points: Any, tmp_path: Path
) -> None:
    networks = trained(build(tiny_sd3))
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path)
    pipeline = plain_pipeline(tiny_sd3, tmp_path)
    with torch.no_grad():
        expected = FAMILY.velocity(pipeline.transformer, *points)
        velocity = networks.velocity("student", *points)
        teacher = networks.velocity("teacher", *points)
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-5)
    assert (velocity - teacher).abs().mean() > 1e-2


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """The inputs of a distillation of the tiny teacher, and parameters with LoRA."""
    folder = tmp_path_factory.mktemp("world")
    params = write_params(folder, tiny_sd3, iterations=20, lora=LORA.model_dump())
    manifest = describe("sd3", str(tiny_sd3), None)
    manifest.write(folder / "teacher.json")
    build_prompts(params, manifest, folder / "prompts")
    return folder, params


def distil(world: tuple[Path, Params], out: Path) -> None:
    with pytest.raises(FileNotFoundError):  # `run` returns the weights of a full student, which is not there
        run(world[0], out, world[1])
    assert (out / "student" / WEIGHTS).exists()


@pytest.fixture(scope="module")
def distilled(world: tuple[Path, Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled")
    distil(world, out)
    return out


def test_a_loader_that_reads_no_header_draws_the_same(tiny_sd3: Path, points: Any, tmp_path: Path) -> None:
    """ComfyUI, sglang and programs that stack LoRAs take the factors alone; here alpha / rank is 4."""
    networks = trained(build(tiny_sd3))
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path)
    with torch.no_grad():
        expected = networks.velocity("student", *points)
        by_folder, by_factors = (
            FAMILY.velocity(plain_pipeline(tiny_sd3, what).transformer, *points)
            for what in (tmp_path, load_file(tmp_path / WEIGHTS))
        )
    assert torch.equal(by_factors, by_folder)
    torch.testing.assert_close(by_factors, expected, atol=1e-6, rtol=1e-5)


def test_distillation_writes_a_lora_that_has_learnt(distilled: Path) -> None:
    assert {path.name for path in (distilled / "student").iterdir()} == {WEIGHTS, "lora.json"}
    weights = load_file(distilled / "student" / WEIGHTS)
    still = [name for name, value in weights.items() if not value.any()]
    # The text's queries in the last block lead nowhere: of its attention only the image's part is used.
    assert still == ["transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"]


def test_resumes_byte_for_byte(
    world: tuple[Path, Params], distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_rounds(monkeypatch, 8, 14)
    for expected in (8, 14):
        with pytest.raises(RuntimeError, match=f"crash {expected}"):
            run(world[0], tmp_path, world[1])
    (folder,) = (tmp_path / "ck").iterdir()
    saved = checkpoint.load_newest(folder)
    assert saved is not None
    weights = load_file(distilled / "student" / WEIGHTS)
    for group in ("student", "fake", "average"):
        assert {f"transformer.{name}" for name in saved.tensors[group]} == set(weights), (
            "adapters and nothing else"
        )
    distil(world, tmp_path)
    for name in (f"student/{WEIGHTS}", "student/lora.json", "log.csv"):
        assert (tmp_path / name).read_bytes() == (distilled / name).read_bytes()


def test_the_student_draws_what_plain_diffusers_draws(
    tiny_params: Params, tiny_teacher: TeacherManifest, tiny_sd3: Path, tmp_path: Path
) -> None:
    networks = trained(build(tiny_sd3))
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path / "student")
    Origin.from_training(tiny_teacher).write(tmp_path / "student" / RECORD)
    build_prompts(tiny_params, tiny_teacher, tmp_path / "prompts")
    cache_latents(tiny_params, tiny_teacher, tmp_path / "prompts", tmp_path / "latents")
    draw_samples(
        tiny_params,
        tiny_teacher,
        *(tmp_path / name for name in ("student", "prompts", "latents", "samples")),
    )
    pipeline = plain_pipeline(tiny_sd3, tmp_path / "student")

    def by_diffusers(texts: list[str], noise: Tensor, output: str) -> Tensor:
        return pipeline(
            texts,
            sigmas=[1.0, 0.5],
            guidance_scale=1.0,
            latents=noise,
            max_sequence_length=0,
            output_type=output,
        ).images

    texts = [text for text in PromptSet(tmp_path / "prompts/eval").texts for _ in range(2)]
    noise = sampling.Store(tmp_path / "latents").all()["noise"]
    latents = sampling.Store(tmp_path / "samples/student/steps2").all()["latents"]
    torch.testing.assert_close(latents, by_diffusers(texts, noise, "latent"), atol=1e-4, rtol=1e-3)
    images = drawing.draw_pictures(tmp_path / "student", texts[:1], 2, seed=7, device="cpu")
    picture = by_diffusers(texts[:1], picture_noise(7, (4, 8, 8)), "pt")
    assert (images - picture * 255).abs().max() < 0.6


def test_a_lora_without_its_teacher_is_named(
    tiny_sd3: Path, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    networks = build(tiny_sd3)
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path / "student")
    Origin.from_training(tiny_teacher).write(tmp_path / "student" / RECORD)
    assert find_student(tmp_path / "student").base == tiny_sd3

    other = TeacherManifest(**{**vars(tiny_teacher), "files": {}})
    with pytest.raises(CdmError, match="a LoRA for another teacher"):
        find_student(tmp_path / "student", other)
    gone = TeacherManifest(**{**vars(tiny_teacher), "source": str(tmp_path / "gone")})
    Origin.from_training(gone).write(tmp_path / "student" / RECORD)
    with pytest.raises(CdmError, match=r"student: a LoRA for .*gone, which is not to be had: .*no such folder"):
        find_student(tmp_path / "student")
    (tmp_path / "student" / "lora.json").write_text(json.dumps({"family": "sd3"}))
    with pytest.raises(CdmError, match=r"lora\.json: damaged"):
        find_student(tmp_path / "student")


def test_broken_weights_are_a_one_line_error(
    tiny_sd3: Path, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    Origin.from_training(tiny_teacher).write(tmp_path / RECORD)
    with pytest.raises(CdmError, match="cannot be loaded as a LoRA") as error:
        find_student(tmp_path).load()
    assert len(str(error.value).splitlines()) == 1


def test_a_lora_replaces_a_full_student(
    world: tuple[Path, Params], distilled: Path, tiny_sd3: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "student")
    (tmp_path / "student" / "student.json").write_text("{}")
    (tmp_path / "student" / "text_encoder_3").mkdir()
    shutil.copytree(distilled / "ck", tmp_path / "ck")  # the training is done, and its student is written again
    before = os.umask(0o027)
    try:
        distil(world, tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert {path.name for path in (tmp_path / "student").rglob("*")} == {WEIGHTS, "lora.json"}
    for name in (WEIGHTS, "lora.json"):
        assert (tmp_path / "student" / name).read_bytes() == (distilled / "student" / name).read_bytes()
        assert stat.filemode((tmp_path / "student" / name).stat().st_mode) == "-rw-r-----"


def test_a_folder_of_other_things_is_refused_before_the_training(
    world: tuple[Path, Params], tiny_sd3: Path, tmp_path: Path
) -> None:
    """Among them a teacher, which is no student."""
    shutil.copytree(tiny_sd3, tmp_path / "student")
    with pytest.raises(CdmError, match="student: holds other things than a student: move it away"):
        run(world[0], tmp_path, world[1])
    assert (tmp_path / "student" / "transformer").exists()
    assert not (tmp_path / "ck").exists()
    shutil.rmtree(tmp_path / "student")
    (tmp_path / "student").touch()
    with pytest.raises(CdmError, match="student: a file is in the way: move it away"):
        run(world[0], tmp_path, world[1])


def test_a_full_student_replaces_a_lora(
    tiny_sd3: Path, tiny_teacher: TeacherManifest, distilled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "world"
    folder.mkdir()
    params = write_params(folder, tiny_sd3, iterations=6)
    tiny_teacher.write(folder / "teacher.json")
    build_prompts(params, tiny_teacher, folder / "prompts")
    shutil.copytree(distilled / "student", tmp_path / "student")
    run(folder, tmp_path, params)
    assert not list((tmp_path / "student").glob("*lora*")), "nothing of the LoRA is left"
    assert find_student(tmp_path / "student").base == tmp_path / "student"


# What is adapted


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("attention", {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}),
        (
            "attention+feed-forward",
            {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"},
        ),
        (["ff.net.2"], {"ff.net.2"}),
        (["transformer_blocks.1.*.to_q"], {"attn.to_q"}),
    ],
)
def test_targets_say_which_layers_are_adapted(
    tiny_sd3: Path, tmp_path: Path, targets: Any, adapted: set[str]
) -> None:
    lora = Lora(rank=2, alpha=4, targets=targets)
    networks = LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), lora, seed=1)
    names = {name.split(".lora_")[0] for name in networks.parameters("student")}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
    text |= {"ff_context.net.0.proj", "ff_context.net.2"}
    assert {name.removeprefix("transformer_blocks.1.") for name in names if ".1." in name} - text == adapted
    assert any(".0." in name.split("transformer_blocks")[1][:3] for name in names) != (
        targets == ["transformer_blocks.1.*.to_q"]
    )
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path)
    plain_pipeline(tiny_sd3, tmp_path)


def test_a_target_that_is_no_layer_is_named(tiny_sd3: Path) -> None:
    lora = Lora(rank=2, alpha=4, targets=["to_q", "to_w"])
    with pytest.raises(
        CdmError, match=r"distill\.lora\.targets: no linear layer of SD3Transformer2DModel .* in to_w"
    ):
        LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), lora, seed=1)


# Without a fake score


@pytest.mark.parametrize("lora", [None, LORA.model_dump()])
def test_a_method_that_asks_no_fake_score_holds_none(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    """Consistency: no weights, no optimiser, nothing in a checkpoint, and no column on a sheet of pictures."""
    consistency = {"ca": {"weight": 0.0, "scale": 0.0}, "dm": {"weight": 0.0}, "cdm": {"weight": 0.0}}
    consistency |= {"consistency": {"weight": 1.0, "step": 0.1}}
    params = write_params(
        tmp_path, tiny_sd3, iterations=8, lora=lora, losses=consistency, fake_knows_level=True
    )
    manifest = describe("sd3", str(tiny_sd3), None)
    build_prompts(params, manifest, tmp_path / "prompts")
    inputs = Inputs.gather(params, manifest, tmp_path / "prompts")
    networks = build_networks(params.distill, 0, inputs, torch.device("cpu"))
    assert networks.parameters("fake") == {}
    held = networks.models if isinstance(networks, FullNetworks) else networks.adapters  # type: ignore[attr-defined]
    assert "fake" not in held
    watched = params.model_copy(update={"runtime": params.runtime.model_copy(update={"pictures_every": 8})})
    monkeypatch.setattr("cdm.training.pictures.losses", lambda curves: repr(curves).encode())
    train(watched, inputs, tmp_path, watched=True)
    (folder,) = (tmp_path / "ck").iterdir()
    saved = checkpoint.load_newest(folder)
    assert saved is not None
    assert set(saved.tensors) == {"student", "student_optimiser", "average"}
    assert (tmp_path / "pictures" / "iteration-000008.png").exists()
