"""Layouts of a teacher that people have: what belongs to its pipeline is hashed, loaded and copied, and no more."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm.errors import CdmError
from cdm.families import Family, get_family
from cdm.families.folder import pipeline_files
from cdm.handover.snippet import diffusers_code
from cdm.models.manifest import TeacherManifest, describe
from cdm.models.student import Model, student_hashes
from cdm.system.files import Memory
from tests.teachers import change, clutter, copy, lock, rename, rights_that_bind, shard, unlock, weights
from tests.tiny_pipelines import BUILDERS, PROMPTS, RESOLUTION, TEXT_TOKENS


def family(name: str) -> Family:
    return get_family(name.removesuffix("_t5"))


def found(name: str, folder: Path) -> TeacherManifest:
    return describe(name.removesuffix("_t5"), str(folder), None, RESOLUTION)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def student(name: str, teacher: Path, folder: Path) -> Path:
    """A student of the teacher's own weights."""
    family(name).save_student(family(name).load_transformer(teacher), teacher, folder)
    return folder


@pytest.fixture
def of(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline, by its name."""
    return lambda name: copy(tiny_pipeline(name), tmp_path / name)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_belongs_to_no_pipeline_is_neither_hashed_nor_copied(
    of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = of(name)
    own, before = tree(folder), found(name, folder)
    assert set(before.files) == set(own), "all of a pipeline that diffusers has saved"
    clean = tree(student(name, folder, tmp_path / "clean"))
    clutter(folder)
    assert found(name, folder) == before
    assert tree(student(name, folder, tmp_path / "student")) == clean
    assert set(clean) == set(own)


@pytest.mark.parametrize(("name", "variant"), [*((name, "fp16") for name in BUILDERS), ("flux", "bf16")])
def test_weights_that_are_there_in_a_variant_alone_are_used(
    of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str
) -> None:
    folder = of(name)
    plain = found(name, folder)
    expected = tree(student(name, folder, tmp_path / "plain"))
    for path in sorted(folder.glob("*/*.safetensors")):
        rename(path, variant)
    manifest = found(name, folder)
    assert (manifest.latent_shape, manifest.parameters) == (plain.latent_shape, plain.parameters)
    assert [path for path in manifest.files if path.endswith(".safetensors")] == [
        path.replace(".safetensors", f".{variant}.safetensors")
        for path in plain.files
        if path.endswith(".safetensors")
    ]
    assert sorted(manifest.files.values()) == sorted(plain.files.values())
    assert family(name).encode(family(name).load_pipeline(folder), PROMPTS, TEXT_TOKENS[name])
    assert tree(student(name, folder, tmp_path / "student")) == expected, "a student has plain names"


@pytest.mark.parametrize(("variant", "legacy"), [("", False), ("fp16", False), ("fp16", True)])
def test_shards_are_used_in_any_variant(
    of: Callable[[str], Path], tmp_path: Path, variant: str, legacy: bool
) -> None:
    folder = of("sd3_t5")
    before, pipeline = found("sd3_t5", folder), family("sd3").load_pipeline(folder)
    shard(folder, "transformer", variant, legacy)
    if not legacy:  # which was diffusers' alone
        shard(folder, "text_encoder_3", variant)
    manifest = found("sd3_t5", folder)
    assert manifest.digest != before.digest
    assert len([path for path in manifest.files if "00002-of-00002" in path]) == (1 if legacy else 2)
    again = family("sd3").load_pipeline(folder)
    learnt = family("sd3").load_pipeline(student("sd3", folder, tmp_path / "student"))
    for part in ("transformer", "text_encoder_3"):
        for name, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(getattr(again, part).state_dict()[name], value)
            assert torch.equal(getattr(learnt, part).state_dict()[name], value)


def test_each_part_has_its_own_variant_and_a_plain_file_comes_first(of: Callable[[str], Path]) -> None:
    folder = of("sd3")
    plain = pipeline_files(folder)
    shutil.copy(weights(folder, "vae"), folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert pipeline_files(folder) == plain
    rename(weights(folder, "text_encoder"), "fp16")
    rename(weights(folder, "transformer"), "bf16")
    files = pipeline_files(folder)
    assert {name: path for name, path in files.items() if name != path} == {
        "text_encoder/model.safetensors": "text_encoder/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors": "transformer/diffusion_pytorch_model.bf16.safetensors",
    }
    (folder / "text_encoder/model.bf16.safetensors").write_bytes(weights(folder, "text_encoder").read_bytes())
    assert pipeline_files(folder)["text_encoder/model.safetensors"] == "text_encoder/model.bf16.safetensors"
    assert family("sd3").load_pipeline(folder).text_encoder is not None


def test_a_student_of_a_variant_is_the_same_bytes_every_time(of: Callable[[str], Path], tmp_path: Path) -> None:
    """Its config names the teacher, and not where it was put for loading."""
    folder = of("sd3")
    rename(weights(folder, "transformer"), "fp16")
    one, two = (tree(student("sd3", folder, tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert json.loads(one["transformer/config.json"])["_name_or_path"] == str(folder)


def test_code_for_diffusers_names_the_variant_of_the_teacher(of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = of("sd3")
    shutil.copytree(folder, tmp_path / "plain")
    for part in ("transformer", "vae"):  # which others are not
        rename(weights(folder, part), "fp16")
    code = diffusers_code(Model(family("sd3"), folder), "mine", "lora", "a red one")
    assert 'variant="fp16"' in code
    assert "variant" not in diffusers_code(
        Model(family("sd3"), tmp_path / "plain"), "mine", "lora", "a red one"
    )
    assert "variant" not in diffusers_code(Model(family("sd3"), folder), "mine", "diffusers", "a red one")
    loading = code[code.index("from diffusers") : code.index("pipeline.load_lora_weights")]
    names: dict[str, Any] = {}
    exec(loading, names)
    assert names["pipeline"].transformer is not None


def test_an_index_that_names_files_elsewhere_is_refused(of: Callable[[str], Path]) -> None:
    folder = of("sd3")
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(CdmError, match=re.escape(f"{index}: names files in other folders")):
        found("sd3", folder)


def test_a_chat_template_is_part_of_the_teacher(of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = of("z_image")
    before = found("z_image", folder)
    template = folder / "tokenizer/chat_template.jinja"
    assert "tokenizer/chat_template.jinja" in before.files
    template.write_text(template.read_text() + " ")
    after = found("z_image", folder)
    assert after.digest != before.digest
    assert (student("z_image", folder, tmp_path / "student") / "tokenizer/chat_template.jinja").is_file()
    more = folder / "tokenizer/additional_chat_templates/tools.jinja"
    more.parent.mkdir()
    more.write_text("{{ messages }}")
    assert "tokenizer/additional_chat_templates/tools.jinja" in found("z_image", folder).files


def test_parts_that_are_links_are_hashed_and_copied_like_any_other(
    of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = of("sd3")
    before = found("sd3", folder)
    parts = ["text_encoder", "transformer", "vae", "tokenizer", "scheduler"]
    for part in parts:
        (folder / part).rename(tmp_path / part)
        (folder / part).symlink_to(tmp_path / part)
    assert found("sd3", folder).digest == before.digest
    for _ in range(2):
        made = student("sd3", folder, tmp_path / "student")
        assert not any((made / part).is_symlink() for part in parts)
        assert set(tree(made)) == set(before.files)
    digests = {before.digest}
    for part in parts:
        (some,) = list((tmp_path / part).glob("*config.json"))
        some.write_text(some.read_text() + "\n")
        digests.add(found("sd3", folder).digest)
    assert len(digests) == 1 + len(parts)


def test_links_in_a_folder_that_an_evaluation_reads_are_followed(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").write_text("one")
    (tmp_path / "judge/inside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "judge/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "judge")
    (tmp_path / "judge/back").symlink_to(tmp_path / "judge")
    first = Memory().folder(tmp_path / "judge")
    assert {"again/weights", "inside/weights"} <= set(first)
    assert len(first) < 10, "a circle of links ends"
    (tmp_path / "elsewhere/weights").write_text("two")
    assert Memory().folder(tmp_path / "judge") != first


@pytest.mark.parametrize("name", ["sd3_t5", "z_image"])
def test_a_teacher_that_may_not_be_written_to_has_students_that_may(
    of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = of(name)
    writable = tree(student(name, folder, tmp_path / "first"))
    lock(folder)
    try:
        with rights_that_bind():
            with pytest.raises(PermissionError):
                (folder / "model_index.json").write_text("")
            found(name, folder)
            for _ in range(2):  # the second replaces the first
                made = student(name, folder, tmp_path / "student")
            assert tree(made) == writable
            for path in [made, *made.rglob("*")]:
                assert os.access(path, os.W_OK, effective_ids=True)
                assert path.stat().st_mode & stat.S_IWUSR
            shutil.rmtree(made)
    finally:
        unlock(folder)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_student_in_the_place_of_links_leaves_what_they_lead_to(
    of: Callable[[str], Path], tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """As DVC puts a student into the workspace from its cache."""
    folder = of("sd3")
    cached = student("sd3", folder, tmp_path / "cached")
    before = tree(cached)
    for path in sorted(cached.rglob("*")):
        target = tmp_path / "student" / path.relative_to(cached)
        target.mkdir(parents=True) if path.is_dir() else None
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            link(path, target)
    lock(cached)
    change(weights(folder, "vae"), lambda tensors: {name: value + 1 for name, value in tensors.items()})
    try:
        with rights_that_bind():
            made = student("sd3", folder, tmp_path / "student")
        assert tree(made) != before
        assert tree(cached) == before
        assert not any(path.is_symlink() for path in made.rglob("*"))
    finally:
        unlock(cached)


def test_the_hash_of_a_student_is_that_of_its_files_and_record(
    of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = student("sd3", of("sd3"), tmp_path / "student")
    before = student_hashes(folder)
    assert set(before) == set(tree(folder))
    (folder / "README.md").write_text("a card")
    assert student_hashes(folder) == before
    (folder / "student.json").write_text("{}")
    assert set(student_hashes(folder)) == {*before, "student.json"}
    lora = tmp_path / "lora"
    lora.mkdir()
    for name in ("lora.json", "pytorch_lora_weights.safetensors", "README.md"):
        (lora / name).write_text(name)
    assert set(student_hashes(lora)) == {"lora.json", "pytorch_lora_weights.safetensors"}
    assert set(student_hashes(lora / "pytorch_lora_weights.safetensors")) == {
        "pytorch_lora_weights.safetensors"
    }


def test_the_miniature_is_the_teacher_that_it_was() -> None:
    """The locks, the comparison and every student name it by this hash."""
    digest = "1382e503fe8a7628d7a0bce1c4afd5861049f802e861eb0949745a987964ac5f"
    assert describe("sd3", str(Path(__file__).parent.parent / "miniature/teacher"), None).digest == digest
