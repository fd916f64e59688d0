"""What leaves the pipeline: it loads in plain diffusers, and its own card draws what `cdm sample` draws."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.handover import card, drawing, export
from cdm.handover.export import quality_of
from cdm.handover.snippet import Layout
from cdm.models.manifest import TeacherManifest, describe
from cdm.models.student import FULL, LORA, Origin, find_student, student_hashes
from cdm.params import Lora, Params
from cdm.system import git
from cdm.system.files import digest_of
from cdm.training.networks import LoraNetworks
from tests.test_cli import Command, command  # noqa: F401 - a fixture
from tests.tiny_pipelines import RESOLUTION, TEXT_TOKENS

FAMILY = get_family("sd3")
PROMPT = "a red three on black paper"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def lora_student(tiny_sd3: Path, tiny_teacher: TeacherManifest, tiny_params: Params, tmp_path: Path) -> Path:
    """A LoRA that changes much."""
    networks = LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), Lora(rank=3, alpha=12), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in networks.parameters("student").values():
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
    networks.save_student(networks.parameters("student"), tiny_sd3, tmp_path / "learnt")
    Origin.from_training(tiny_teacher, tiny_params).write(tmp_path / "learnt" / LORA)
    return tmp_path / "learnt"


@pytest.fixture
def full_student(tiny_sd3: Path, tiny_teacher: TeacherManifest, tiny_params: Params, tmp_path: Path) -> Path:
    """A student of its own weights."""
    transformer = FAMILY.load_transformer(tiny_sd3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.2)
    FAMILY.save_student(transformer, tiny_sd3, tmp_path / "whole")
    Origin.from_training(tiny_teacher, tiny_params).write(tmp_path / "whole" / FULL)
    return tmp_path / "whole"


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.tensor(list(picture.get_flattened_data()))


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for kind, content in found if kind == language]


@pytest.mark.parametrize(
    ("kind", "layout", "name"),
    [
        ("lora_student", "diffusers", "fused"),
        ("lora_student", "lora", "adapter"),
        ("lora_student", "single-file", "fused.safetensors"),
        ("full_student", "diffusers", "folder"),
        ("full_student", "single-file", "file.safetensors"),
    ],
)
def test_the_cards_own_code_draws_what_cdm_sample_draws(
    command: Command,  # noqa: F811
    request: pytest.FixtureRequest,
    tiny_sd3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: Layout,
    name: str,
) -> None:
    student = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    assert command("export", student, "--format", layout, "--out", name).code == 0
    text = export.export(student, tmp_path / "again" / name, layout).card.read_text()
    (code,), (line,) = blocks(text, "python"), blocks(text, "")
    exec(code.replace(card.PROMPT, PROMPT), {})
    by_diffusers = pixels(Path("picture.png"))
    words = re.findall(r'"[^"]*"|\S+', line)
    assert words[:2] == ["cdm", "sample"]
    arguments = [word.strip('"').replace(card.PROMPT, PROMPT) for word in words[1:]]
    assert command(*arguments, "--device", "cpu").code == 0
    assert torch.equal(by_diffusers, pixels(Path("picture.png")))
    teacher = drawing.draw_pictures(tiny_sd3, [PROMPT], 4, seed=0, device="cpu")
    assert (by_diffusers.T.reshape(3, 32, 32) - teacher[0]).abs().float().mean() > 1
    # And all of it is the student that went in.
    assert command("sample", PROMPT, "--student", student, "--out", "student.png", "--device", "cpu").code == 0
    assert (by_diffusers - pixels(Path("student.png"))).abs().max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        "longcat",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3_t5", "flux", "qwen_image", "z_image")),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "lora"])
def test_it_does_so_whatever_the_architecture(
    command: Command,  # noqa: F811
    tiny_pipeline: Callable[[str], Path],
    tiny_params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: Layout,
) -> None:
    source = tiny_pipeline(name)
    family = get_family("sd3" if name == "sd3_t5" else name)
    length = {"longcat": 512}.get(name, TEXT_TOKENS[name])
    prompts = tiny_params.prompts.model_copy(update={"max_sequence_length": length})
    teacher = describe(family.name, str(source), None, RESOLUTION)
    origin = Origin.from_training(teacher, tiny_params.model_copy(update={"prompts": prompts}))
    networks = LoraNetworks(family, family.load_transformer(source), Lora(rank=2, alpha=8), seed=1)
    with torch.no_grad():
        for value in networks.parameters("student").values():
            value.add_(0.1)
    networks.save_student(networks.parameters("student"), source, tmp_path / "learnt")
    origin.write(tmp_path / "learnt" / LORA)
    monkeypatch.chdir(tmp_path)
    text = export.export(tmp_path / "learnt", Path("out"), layout).card.read_text()
    (code,), (line,) = blocks(text, "python"), blocks(text, "")
    exec(code.replace(card.PROMPT, PROMPT), {})
    by_diffusers = pixels(Path("picture.png"))
    arguments = [word.strip('"').replace(card.PROMPT, PROMPT) for word in re.findall(r'"[^"]*"|\S+', line)][1:]
    assert command(*arguments, "--device", "cpu").code == 0
    assert (by_diffusers - pixels(Path("picture.png"))).abs().max() <= 1


def test_a_picture_is_that_of_its_prompt_and_seed(full_student: Path) -> None:
    """Whatever is drawn with it: what a PNG's metadata say is enough to draw it again."""
    together = drawing.draw_pictures(full_student, ["a", PROMPT, "三"], 2, seed=5, device="cpu")
    alone = drawing.draw_pictures(full_student, [PROMPT], 2, seed=6, device="cpu")
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(drawing.draw_pictures(full_student, [PROMPT], 2, seed=5, device="cpu"), alone)


def test_half_precision_draws_nearly_the_same(full_student: Path) -> None:
    exact = drawing.draw_pictures(full_student, [PROMPT], 2, seed=5, device="cpu").float()
    rounded = drawing.draw_pictures(full_student, [PROMPT], 2, seed=5, device="cpu", dtype="bf16").float()
    assert 0 < (rounded - exact).abs().mean() < 4


def test_students_draw_at_the_size_that_they_were_trained_at(
    full_student: Path, tiny_teacher: TeacherManifest
) -> None:
    Origin.from_training(TeacherManifest(**{**vars(tiny_teacher), "latent_shape": [4, 4, 6]})).write(
        full_student / FULL
    )
    assert drawing.draw_pictures(full_student, [PROMPT], 1, seed=0, device="cpu").shape == (1, 3, 16, 24)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_that_of_the_students_own_weights(
    lora_student: Path, tiny_sd3: Path, tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    fused = export.export(lora_student, tmp_path / "fused", "diffusers", precision=precision).path
    assert {value.dtype for value in load_file(fused / TRANSFORMER).values()} == {dtype}
    for path in (fused / "vae").iterdir():
        assert path.read_bytes() == (tiny_sd3 / "vae" / path.name).read_bytes()
    adapter = export.export(lora_student, tmp_path / "adapter", "lora", precision=precision).path
    (weights,) = adapter.glob("*.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {dtype}
    with safe_open(weights, framework="pt") as new, safe_open(lora_student / weights.name, "pt") as old:
        assert new.metadata() == old.metadata(), "rank and alpha are there"
    single = export.export(lora_student, tmp_path / "a.safetensors", "single-file", precision=precision).path
    for name, value in load_file(single).items():
        assert torch.equal(value, load_file(fused / TRANSFORMER)[name])


def test_single_files_load_back_equal(full_student: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    out = export.export(full_student, tmp_path / "a.safetensors", "single-file").path
    loaded = SD3Transformer2DModel.from_single_file(out, config=str(full_student), subfolder="transformer")
    expected = load_file(full_student / TRANSFORMER)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_same_export_is_the_same_bytes(lora_student: Path, tmp_path: Path) -> None:
    for layout, name in (("diffusers", "a"), ("lora", "a"), ("single-file", "a.safetensors")):
        first, second = (export.export(lora_student, tmp_path / f"{layout}{i}" / name, layout) for i in "01")  # type: ignore[arg-type]
        for one, other in ((first.path, second.path), (first.card, second.card)):
            if one.is_dir():
                assert student_hashes(one) == student_hashes(other)
            else:
                assert one.read_bytes() == other.read_bytes()


def test_exports_can_be_exported_again(lora_student: Path, tmp_path: Path) -> None:
    single = export.export(lora_student, tmp_path / "a.safetensors", "single-file").path
    folder = export.export(single, tmp_path / "folder", "diffusers").path
    again = export.export(folder, tmp_path / "b.safetensors", "single-file").path
    assert again.read_bytes() == single.read_bytes()


def test_a_lora_for_comfyui_is_the_students_own(
    command: Command,  # noqa: F811
    lora_student: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "few.safetensors"
    result = command("export", lora_student, "--format", "comfyui", "--out", out)
    assert result.code == 0
    (weights,) = lora_student.glob("*.safetensors")
    mine, theirs = load_file(weights), load_file(out)

    def learnt(factors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]

    queries, keys, values = learnt(theirs, "diffusion_model.joint_blocks.1.context_block.attn.qkv").chunk(3)
    for name, value in (("q", queries), ("k", keys), ("v", values)):
        expected = learnt(mine, f"transformer.transformer_blocks.1.attn.add_{name}_proj")
        torch.testing.assert_close(value, expected)
    again = export.export(lora_student, tmp_path / "again" / "few.safetensors", "comfyui")
    assert again.path.read_bytes() == out.read_bytes()
    text = again.card.read_text()
    assert "`few.safetensors` into `models/loras`" in text
    assert "4 steps 1, 0.75, 0.5, 0.25, before" in text
    data = front_matter(again.card)
    assert {"lora", "comfyui"} <= set(data["tags"])
    half = export.export(lora_student, tmp_path / "half.safetensors", "comfyui", precision="bf16").path
    assert {value.dtype for value in load_file(half).values()} == {torch.bfloat16}


def test_paths_may_be_text(lora_student: Path, tmp_path: Path) -> None:
    done = export.export(
        str(lora_student), str(tmp_path / "few"), "lora", metrics=str(tmp_path / "absent.json")
    )
    assert done.path == tmp_path / "few"
    assert done.card == tmp_path / "few/README.md"
    assert done.card.is_file()


def test_an_export_may_be_read_by_those_whom_the_umask_lets_read(
    full_student: Path, lora_student: Path, tmp_path: Path
) -> None:
    """Whatever the files of the student are: private, as safetensors makes them, or read-only, as DVC's links are."""
    for path in [*full_student.rglob("*.safetensors"), *lora_student.rglob("*.safetensors")]:
        path.chmod(0o400)
    before = os.umask(0o027)
    try:
        for student, layout, name in (
            (full_student, "diffusers", "folder"),
            (full_student, "single-file", "file.safetensors"),
            (lora_student, "lora", "lora"),
            (lora_student, "diffusers", "fused"),
        ):
            out = export.export(student, tmp_path / "out" / name, layout).path  # type: ignore[arg-type]
            assert out.exists()
    finally:
        os.umask(before)
    modes = {stat.filemode(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"drwxr-x---", "-rw-r-----"}


def test_nothing_is_overwritten(lora_student: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "a.md").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        CdmError, match=r"taken: exists and is not overwritten: remove it, or give --out another"
    ):
        export.export(lora_student, tmp_path / "taken", "diffusers")
    with pytest.raises(CdmError, match=r"a\.md: exists"):
        export.export(lora_student, tmp_path / "a.safetensors", "single-file")
    with pytest.raises(CdmError, match=r"give a name that ends in \.safetensors for the format single-file"):
        export.export(lora_student, tmp_path / "a", "single-file")
    with pytest.raises(CdmError, match="give the name of a folder for the format lora"):
        export.export(lora_student, tmp_path / "a.safetensors", "lora")
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_that_fails_leaves_nothing(
    lora_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(FAMILY), "save_student", full_disk)
    with pytest.raises(CdmError, match=r"--out is .*folder: No space left on device"):
        export.export(lora_student, tmp_path / "folder", "diffusers")
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_student_has_not_got_is_a_line_that_says_what_to_do(
    full_student: Path, lora_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CdmError, match="there is no LoRA in it: use the format diffusers or single-file, or"):
        export.export(full_student, tmp_path / "a", "lora")
    with pytest.raises(CdmError, match="there is no LoRA in it: use the format diffusers or single-file, or"):
        export.export(full_student, tmp_path / "a.safetensors", "comfyui")
    monkeypatch.setattr(export, "_has_single_file_loader", lambda _: False)
    with pytest.raises(
        CdmError, match="loads no single file as a SD3Transformer2DModel: use the format diffusers or"
    ):
        export.export(lora_student, tmp_path / "a.safetensors", "single-file")


def test_files_that_are_no_export_are_named(tmp_path: Path, tiny_teacher: TeacherManifest) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CdmError, match=r"a\.safetensors: does not say which teacher it needs"):
        find_student(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CdmError, match=r"a\.safetensors: not a readable safetensors file"):
        find_student(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"cdm": Origin.from_training(tiny_teacher).as_text()})
    with pytest.raises(CdmError, match="not of the teacher's transformer") as error:
        find_student(path).load()
    assert len(str(error.value).splitlines()) == 1


# The card


def front_matter(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard.load(path).data.to_dict()
    return data


def test_the_card_says_what_the_hub_reads(
    lora_student: Path, full_student: Path, tiny_sd3: Path, tiny_teacher: TeacherManifest, tmp_path: Path
) -> None:
    data = front_matter(export.export(lora_student, tmp_path / "here", "lora").card)
    assert "base_model" not in data, "a folder has no name on the hub"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"text-to-image", "few-step", "cdm", "sd3", "lora"} <= set(data["tags"])

    model = find_student(full_student)
    there = Origin.from_training(
        TeacherManifest(**{**vars(tiny_teacher), "source": "org/teacher", "revision": "0123abcd"})
    )
    for layout, relation in (("lora", "adapter"), ("diffusers", "finetune"), ("single-file", "finetune")):
        about = card.Export("x", layout, type(model)(FAMILY, tiny_sd3, origin=there), "bf16", None, None)  # type: ignore[arg-type]
        (tmp_path / "card.md").write_text(card.model_card(about))
        data = front_matter(tmp_path / "card.md")
        assert (data["base_model"], data["base_model_relation"]) == ("org/teacher", relation)
        assert ("lora" in data["tags"]) == (layout == "lora")
        assert "`org/teacher` at `0123abcd`" in card.model_card(about)


def test_the_card_has_parameters_and_commit(
    full_student: Path, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git, "commit", lambda _: "abc123")
    text = export.export(full_student, tmp_path / "out", "diffusers").card.read_text()
    (params,) = blocks(text, "yaml")
    values = YAML(typ="safe").load(params)
    expected = tiny_params.model_dump(mode="json")
    assert values == {
        "seed": expected["seed"],
        "prompts": {"max_sequence_length": 0},
        "schedule": expected["schedule"],
        "distill": expected["distill"],
    }
    assert "commit `abc123`" in text
    assert str(tmp_path) not in text, "nothing of the machine's own"


def test_the_card_quotes_figures_of_this_student_only(
    command: Command,  # noqa: F811
    full_student: Path,
    lora_student: Path,
    tmp_path: Path,
) -> None:
    rows = {
        "student": {"steps2": {"evaluations": 2, "frechet_distance": 0.946234, "kernel": 3.0, "count": 1024}},
        "teacher": {"steps50": {"evaluations": 100, "frechet_distance": 12.98765}},
    }
    metrics = tmp_path / "quality.json"

    def remark(quality: object, student: Path = full_student) -> str:
        metrics.write_text(json.dumps(quality))
        figures, why = quality_of(student, metrics)
        assert figures is None
        assert why is not None
        return why

    assert quality_of(full_student, metrics) == (None, None), "nothing was measured"
    silent = "quality.json: does not say which student its figures are of"
    for quality in (rows, {}, [], {**rows, "basis": {}}, {"basis": {"student": "x"}}):
        assert silent in remark(quality)
    of_this = {**rows, "basis": {"student": digest_of(student_hashes(full_student)), "samples": "ab"}}
    other = "quality.json: its figures are of another student, and are left out of the card"
    assert other in remark(of_this, student=lora_student)
    assert other in remark({**rows, "basis": {"student": digest_of(student_hashes(lora_student))}})
    result = command("export", full_student, "--out", tmp_path / "a", "--metrics", metrics)
    assert result.err.splitlines() == [
        f"{metrics}: its figures are of another student, and are left out of the card"
    ]
    assert "Not measured" in (tmp_path / "a/README.md").read_text()

    metrics.write_text(json.dumps(of_this))
    result = command("export", full_student, "--out", tmp_path / "b", "--metrics", metrics)
    assert result.err == ""
    text = (tmp_path / "b/README.md").read_text()
    assert "| teacher, guided | 50 | 100 | 12.99 |\n| student | 2 | 2 | 0.9462 |" in text
    assert (
        f"Of 1,024 samples each, drawn by the student whose files have the hash `{of_this['basis']['student'][:12]}`."
        in text
    )
    assert "| model | steps | Evaluations | Distance of pixel statistics |" in text
    seen = {**of_this, "basis": {**of_this["basis"], "judge": "ef" * 32}}
    about = card.Export("x", "diffusers", find_student(full_student), "fp32", seen, None)
    assert "| model | steps | Evaluations | Fréchet distance |" in card.model_card(about)
    half = export.export(full_student, tmp_path / "c", "diffusers", precision="bf16", metrics=metrics)
    assert half.remark is None
    assert "`, before its weights became bf16." in half.card.read_text()
    weights = full_student / TRANSFORMER
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert quality_of(full_student, metrics)[0] is None, "another byte, another student"


def test_the_card_says_whether_the_tree_was_clean(
    full_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        "cdm/losses.py",
        "dvc.lock",
        "params.yaml",
        "plots/a.png",
        "plots/b.png",
        "plots/c.png",
        "plots/d.png",
    ]
    monkeypatch.setattr(git, "commit", lambda _: "abc123")
    for changed, expected in (
        ([], "at commit `abc123`."),
        (
            files[:1],
            "at commit `abc123`, whose tree was not clean: these files differed from it: `cdm/losses.py`.",
        ),
        (files, "`cdm/losses.py`, `dvc.lock`, `params.yaml`, `plots/a.png`, `plots/b.png`, 2 more."),
    ):
        monkeypatch.setattr(git, "differing", lambda _, changed=changed: changed)
        out = tmp_path / str(len(changed))
        assert expected in export.export(full_student, out, "diffusers").card.read_text()
