"""Loading and saving without second copies: the same numbers, and the same files, as diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cdm.errors import CdmError
from cdm.families import Family, get_family
from cdm.families import weights as weights_module
from cdm.families.weights import constants
from cdm.params import Lora
from cdm.training.networks import FullNetworks, LoraNetworks
from cdm.training.start import InFiles
from tests.launching import succeed_in_two_processes
from tests.reference_loading import TYPES, reference
from tests.tiny_pipelines import BUILDERS

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def of(name: str) -> Family:
    return get_family(name.removesuffix("_t5"))


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    """Parameters and constants to the bit, with their types."""
    for one, other in (
        (dict(mine.named_parameters()), dict(theirs.named_parameters())),
        (constants(mine), constants(theirs)),
    ):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == value.dtype, name
            assert one[name].device == value.device, name
            assert one[name].requires_grad == value.requires_grad, name
            assert torch.equal(one[name], value), name


def models(networks: Any) -> list[nn.Module]:
    return list(networks.models.values()) if hasattr(networks, "models") else [networks.model]


@pytest.fixture(params=["file", "shards of fp16"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, Path], Path]:
    """A pipeline's folder as it is saved, or as it is published: halves of its weights in fp16."""

    def store(name: str, folder: Path) -> Path:
        if request.param == "file":
            return folder
        half = reference(of(name), folder).to(torch.float16)
        size = sum(value.nbytes for value in half.state_dict().values())
        half.save_pretrained(tmp_path / "transformer", max_shard_size=size // 2)  # type: ignore[operator]
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
        return tmp_path

    return store


@pytest.mark.parametrize("name", BUILDERS)
def test_a_transformer_is_that_of_diffusers(
    name: str, tiny_pipeline: Callable[[str], Path], stored: Callable[[str, Path], Path]
) -> None:
    family, folder = of(name), stored(name, tiny_pipeline(name))
    for dtype in (*TYPES, torch.float16):
        mine, theirs = family.load_transformer(folder, dtype), reference(family, folder).to(dtype)
        assert_same(mine, theirs)
        assert not mine.training
        here, there = dict(mine.config), dict(theirs.config)  # type: ignore[arg-type]
        assert (here.pop("_name_or_path"), Path(there.pop("_name_or_path"))) == (str(folder), folder)
        assert here == there


ADAPTED = partial(LoraNetworks, lora=Lora(rank=3, alpha=3), seed=1)


@pytest.mark.parametrize(
    ("name", "kind", "autocast"),
    [
        ("sd3", FullNetworks, torch.bfloat16),
        ("sd3", ADAPTED, None),
        *((name, FullNetworks, None) for name in BUILDERS),
        *((name, ADAPTED, torch.bfloat16) for name in BUILDERS),
    ],
)
def test_networks_start_alike_from_files_and_from_memory(
    name: str, tiny_pipeline: Callable[[str], Path], autocast: torch.dtype | None, kind: Any
) -> None:
    family, folder = of(name), tiny_pipeline(name)
    mine = kind(family, InFiles(family, folder), autocast=autocast)
    theirs = kind(family, reference(family, folder), autocast=autocast)
    for here, there in zip(
        *(getattr(each, "models", {"": getattr(each, "model", None)}).values() for each in (mine, theirs)),
        strict=True,
    ):
        assert_same(here, there)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: name != "sd3"]) for name in BUILDERS]
)
def test_two_processes_read_their_slices_alone(
    name: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(tiny_pipeline(name))
    succeed_in_two_processes("tests.run_loading", tmp_path, name)


def test_weights_that_are_not_whole_are_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    family = get_family("sd3")
    (tmp_path / "transformer").mkdir()
    config = (tiny_sd3 / "transformer/config.json").read_text()
    (tmp_path / "transformer/config.json").write_text(config)
    tensors = load_file(tiny_sd3 / WEIGHTS)
    name, lora = "transformer_blocks.0.attn.to_q.weight", Lora(rank=2, alpha=2)

    def refused(match: str) -> None:
        for load in (
            family.load_transformer,
            lambda folder: LoraNetworks(family, InFiles(family, folder), lora, seed=0),
        ):
            with pytest.raises(CdmError, match=match) as error:
                load(tmp_path)
            assert str(error.value).startswith(f"{tmp_path}: cannot be loaded as SD3Transformer2DModel: ")
            assert "\n" not in str(error.value)

    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / WEIGHTS)
    refused(f"no {name}")
    save_file(tensors | {name: tensors[name][1:].clone()}, tmp_path / WEIGHTS)
    refused(r"to_q.weight has the shape \(15, 16\), expected \(16, 16\)")
    (tmp_path / WEIGHTS).write_bytes((tiny_sd3 / WEIGHTS).read_bytes()[:-1])
    refused("not a readable safetensors file")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_is_written_as_diffusers_writes_it(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: bool, dtype: torch.dtype
) -> None:
    """To the byte, whatever the order in which its tensors come."""
    family = get_family("sd3")
    model: Any = family.load_transformer(tiny_sd3, dtype)
    size = "20KB" if shards else "10GB"
    monkeypatch.setattr(weights_module, "LARGEST", size)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    family.save_student(model, tiny_sd3, tmp_path / "whole")
    empty = family.empty_transformer(tiny_sd3, dtype)
    backwards = reversed(list(model.named_parameters()))
    family.save_student(empty, tiny_sd3, tmp_path / "streamed", backwards)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert any(name.endswith(".index.json") for name in names) == shards
    for folder in ("whole", "streamed"):
        written = tmp_path / folder / "transformer"
        assert sorted(path.name for path in written.iterdir()) == names
        for name in names:
            assert (written / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_types_and_names_of_every_kind_are_written(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3, dtype=torch.float16),
        "a": torch.arange(4),
        'quoted "é"': torch.tensor([True]),
        "scalar": torch.tensor(2.5),
        "c": torch.arange(5, dtype=torch.int32),
        "z": torch.ones(2, 2, dtype=torch.bfloat16),
        "d": torch.ones(1, dtype=torch.float64),
        "e": torch.ones(2, dtype=torch.uint8),
    }
    weights_module.write(tmp_path, tensors, tensors.items())
    (path,) = tmp_path.iterdir()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
