"""Finding the teacher, refusing what is none, and the record of which one it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from cdm.errors import CdmError
from cdm.models import hub
from cdm.models.manifest import TeacherManifest, describe
from tests.stand_in_hub import READER, Hub, Repository
from tests.teachers import clutter, rename, shard, weights
from tests.teachers import copy as copied
from tests.tiny_pipelines import RESOLUTION

RESPONSE: Any = SimpleNamespace(headers={}, request=None)


def one_line(source: str, revision: str | None = None) -> str:
    with pytest.raises(CdmError) as error:
        hub.resolve(source, revision)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_folder_is_taken_as_it_is(tiny_sd3: Path) -> None:
    assert hub.resolve(str(tiny_sd3)) == tiny_sd3
    assert hub.resolved_revision(tiny_sd3) is None
    assert "has none: set it to null" in one_line(str(tiny_sd3), "main")


def test_what_is_not_there_or_not_a_pipeline_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "models").mkdir()
    (tmp_path / "file.bin").touch()
    assert "no such folder" in one_line("nowhere")
    assert "no such folder" in one_line("/absent/folder")
    assert "no such folder" in one_line("models/teacher"), "a folder that is here is no organisation of the hub"
    assert "a file" in one_line("file.bin")
    assert "has no model_index.json" in one_line("models")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("x\ny", response=RESPONSE), "gated: ask for access on https://"),
        (lambda: errors.RepositoryNotFoundError("x\ny", response=RESPONSE), "neither a folder here nor"),
        (lambda: errors.RevisionNotFoundError("x\ny", response=RESPONSE), "no such revision"),
        (lambda: errors.LocalEntryNotFoundError("x\ny"), "the hub cannot be reached"),
        (lambda: errors.HFValidationError("x\ny"), "not a valid hub id: x y"),
        (lambda: errors.HfHubHTTPError("x\ny", response=RESPONSE), "could not be downloaded: x y"),
        (lambda: OSError(28, "No space left on device"), "could not be downloaded"),
    ],
)
def test_every_failure_of_the_hub_is_a_line(monkeypatch: pytest.MonkeyPatch, error: Any, message: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    found = one_line("org/name", "v1")
    assert found.startswith("org/name@v1: ")
    assert message in found


def test_the_manifest_says_what_the_model_is(tiny_sd3: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    manifest = describe("sd3", str(tiny_sd3), None)
    assert manifest.latent_shape == [4, 8, 8]
    assert manifest.shift == 3.0
    transformer = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")
    assert manifest.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    assert "transformer/diffusion_pytorch_model.safetensors" in manifest.files
    assert list(manifest.files) == sorted(manifest.files)
    manifest.write(tmp_path / "deep" / "teacher.json")
    assert TeacherManifest.read(tmp_path / "deep" / "teacher.json") == manifest


def test_the_digest_is_that_of_the_content(tiny_sd3: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("not part of the model")
    (tmp_path / "copy" / "vae" / "model.fp16.safetensors").write_text("not loaded")
    here, there = (describe("sd3", str(path), None) for path in (tiny_sd3, tmp_path / "copy"))
    assert here.digest == there.digest
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert describe("sd3", str(tmp_path / "copy"), None).digest != here.digest


def test_another_pipeline_is_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd3, tmp_path / "flux")
    index = tmp_path / "flux" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    with pytest.raises(CdmError, match="a FluxPipeline, but the family sd3 needs a StableDiffusion3Pipeline"):
        describe("sd3", str(tmp_path / "flux"), None)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"family": "sd3"}'])
def test_a_missing_or_damaged_manifest_names_its_stage(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "teacher.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CdmError, match="run the stage `teacher`"):
        TeacherManifest.read(path)


# What is missing or damaged


@pytest.fixture
def copy(tiny_sd3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))


def refused(folder: Path) -> str:
    with pytest.raises(CdmError) as error:
        describe("sd3", str(folder), None)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", ["text_encoder_2/model", "vae/diffusion_pytorch_model"])
def test_a_file_that_is_cut_off_is_named(copy: Path, name: str) -> None:
    path = copy / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert refused(copy).startswith(f"{path}: not a readable safetensors file (")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    assert refused(copy).endswith("(a pointer of Git LFS: run `git lfs pull` where it comes from)")


def test_a_part_or_a_shard_that_is_missing_is_named(copy: Path) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": weights.name, "b": "second.safetensors"}}))
    assert refused(copy) == (
        f"{copy}/transformer/second.safetensors: missing, though the index of shards names it: get the model again"
    )
    index.write_text("{")
    assert refused(copy) == f"{index}: damaged: get the model again"
    index.unlink()
    weights.rename(weights.with_suffix(".bin"))
    assert "transformer: holds no weights in safetensors files" in refused(copy)
    shutil.rmtree(copy / "text_encoder_2")
    assert "text_encoder_2: missing, though model_index.json names it" in refused(copy)


# The hub's own client, without a network


@pytest.fixture
def cache(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, with org/name at a commit, on a machine that is offline and logged in."""
    folder = tmp_path / "cache"
    model = folder / "models--org--name"
    shutil.copytree(tiny_sd3, model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return folder


def test_a_model_that_was_downloaded_is_found_offline(cache: Path, tmp_path: Path) -> None:
    manifest = describe("sd3", "org/name", None)
    assert manifest.revision == "0" * 40
    assert manifest.folder().is_relative_to(cache)
    manifest.write(tmp_path / "teacher.json")
    assert "hf_secret" not in (tmp_path / "teacher.json").read_text()
    assert not any(
        "hf_secret" in path.read_text(errors="ignore") for path in cache.rglob("*") if path.is_file()
    )


def test_a_model_that_was_not_is_a_line(cache: Path) -> None:
    assert "not downloaded before, and the hub cannot be reached" in one_line("org/other")
    assert "the hub cannot be reached" in one_line("org/name", "another-branch")


# Downloading, from a hub on this machine


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", READER)
    with Hub().running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        files = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield running


def upload(served: Hub, folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    served.repositories.setdefault("org/name", Repository()).commits.append(files)


def inside(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_belongs_to_the_pipeline_is_downloaded_once_and_nothing_else(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, served: Hub
) -> None:
    folder = copied(tiny_pipeline("z_image"), tmp_path / "model")
    here = describe("z_image", str(folder), None, RESOLUTION)
    clutter(folder)
    upload(served, folder)
    manifest = describe("z_image", "org/name", None, RESOLUTION)
    assert "tokenizer/chat_template.jinja" in here.files
    assert (manifest.files, manifest.digest) == (here.files, here.digest)
    assert manifest.revision == served.repositories["org/name"].sha
    served.requests.clear()
    assert inside(manifest.folder()) == set(here.files)
    assert not served.requests, "later stages ask for nothing"
    (folder / "vae/config.json").write_text("{}")
    upload(served, folder)
    assert describe("z_image", "org/name", None, RESOLUTION, manifest) == manifest
    assert not served.requests, "nor does this one, whatever is on the hub by now"


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_and_variants_are_downloaded_where_nothing_plain_is(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, served: Hub, variant: str
) -> None:
    folder = copied(tiny_pipeline("sd3_t5"), tmp_path / "model")
    shard(folder, "transformer")
    shard(folder, "text_encoder_3", variant)
    if variant:
        rename(weights(folder, "vae"), variant)
    here = describe("sd3", str(folder), None, RESOLUTION)
    twins = ["transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.bf16.safetensors"]
    for twin in twins:
        (folder / twin).write_text("not loaded")
    upload(served, folder)
    manifest = describe("sd3", "org/name", None, RESOLUTION)
    assert inside(manifest.folder()) == set(here.files)
    assert (manifest.files, manifest.digest) == (here.files, here.digest)


def test_a_hub_repository_that_is_no_pipeline_is_a_line(tmp_path: Path, served: Hub) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/flux1-dev.safetensors").write_text("of another tool")
    upload(served, tmp_path / "model")
    assert "not a diffusers folder: it has no model_index.json" in one_line("org/name")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    (tmp_path / "model/model_index.json").write_text("[]")
    upload(served, tmp_path / "model")
    assert "model_index.json: not a readable config of a diffusers folder (it is no JSON object)" in one_line(
        "org/name"
    )
