"""A LoRA for other programs: the strength of its factors, and ComfyUI's names, key by key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.handover.adapters import FIRST, SECOND, for_comfyui, read_lora
from cdm.models.student import find_student

WIDTH = 3072
"""Of the layers: diffusers reads FLUX.1's files with this very width."""
FUSED = 3 * WIDTH + 4 * WIDTH


class Layers(nn.Module):
    """The linear layers of a transformer, two blocks of each kind, by their names in diffusers: `WIDTH` rows each,
    `wide` ones four times as many."""

    def __init__(self, names: list[str], wide: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            rows = 4 * WIDTH if name.endswith(wide) else WIDTH
            module: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.add_module(last, nn.Linear(1, rows, bias=False, device="meta"))


class Published(dict[str, Tensor]):
    """A file of a model's authors in which everything is zero, whatever is asked for, but for what is put in."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def pop(self, key: str, *default: Any) -> Tensor:
        self.asked.add(key)
        if key in self:
            return super().pop(key)
        rows = FUSED if key.endswith(("linear1.weight", "linear1.bias")) else 6
        return torch.zeros(rows, 1)

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6, 1)


def layers_of(family_name: str) -> Layers:
    family = get_family(family_name)
    patterns = [part for parts in family.original_layers.values() for part in parts]
    names = [part.format(number) for number in (0, 1) for part in patterns]
    if family_name == "sd3":  # the last block's text ends in its attention, and only the first has a second one
        gone = ("1.attn.to_add_out", "1.ff_context.net.0.proj", "1.ff_context.net.2")
        names = [name for name in names if not name.endswith(gone) and "1.attn2" not in name]
    return Layers(names, ("proj_mlp",))


def factors_of(layers: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in layers.named_modules():
        if isinstance(layer, nn.Linear):
            found[name + FIRST] = torch.randn(2, 1, generator=generator)
            found[name + SECOND] = torch.randn(layer.out_features, 2, generator=generator)
    return found


@pytest.mark.parametrize(
    ("family_name", "reader"),
    [
        ("sd3", "convert_sd3_transformer_checkpoint_to_diffusers"),
        ("flux", "convert_flux_transformer_checkpoint_to_diffusers"),
        ("longcat", "convert_flux_transformer_checkpoint_to_diffusers"),
        ("z_image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    ],
)
def test_comfyuis_names_are_those_of_the_original_files(family_name: str, reader: str) -> None:
    """diffusers itself reads such a file: what each key has learnt must arrive at the layer that has learnt it.

    LongCat-Image has the layers of FLUX.1, and ComfyUI reads it as such.
    """
    from diffusers.loaders import single_file_utils

    layers = layers_of(family_name)
    factors = factors_of(layers)
    named = for_comfyui(get_family(family_name), layers, factors)
    keys = {name.removesuffix(FIRST) for name in named if name.endswith(FIRST)}
    assert all(re.fullmatch(r"diffusion_model\.[a-z_0-9.]+\.lora_[AB]\.weight", name) for name in named)
    learnt = {
        f"{key.removeprefix('diffusion_model.')}.weight": named[key + SECOND] @ named[key + FIRST]
        for key in keys
    }
    file = Published(learnt)
    arrived = getattr(single_file_utils, reader)(file)
    assert learnt.keys() <= file.asked, "no key is left unread"
    for name, layer in layers.named_modules():
        if isinstance(layer, nn.Linear):
            expected = factors[name + SECOND] @ factors[name + FIRST]
            torch.testing.assert_close(arrived.pop(f"{name}.weight"), expected)
    assert not any(value.any() for value in arrived.values()), "and nothing arrives elsewhere"


def test_qwen_images_names_are_the_same() -> None:
    """Its original files have diffusers' names: those of the model's own blocks."""
    from diffusers import QwenImageTransformer2DModel

    layers = layers_of("qwen_image")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=2, attention_head_dim=8, num_attention_heads=2)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, layer in layers.named_modules() if isinstance(layer, nn.Linear)} <= linear
    factors = factors_of(layers)
    named = for_comfyui(get_family("qwen_image"), layers, factors)
    assert named.keys() == {f"diffusion_model.{name}" for name in factors}
    assert all(torch.equal(named[f"diffusion_model.{name}"], value) for name, value in factors.items())


def test_a_part_of_a_layer_that_has_not_learnt_stays() -> None:
    layers = layers_of("sd3")
    factors = {name: value for name, value in factors_of(layers).items() if ".0.attn.to_k." in name}
    named = for_comfyui(get_family("sd3"), layers, factors)
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    assert named.keys() == {key + FIRST, key + SECOND}
    queries, keys, values = (named[key + SECOND] @ named[key + FIRST]).chunk(3)
    assert not queries.any()
    assert not values.any()
    torch.testing.assert_close(keys, factors[f"transformer_blocks.0.attn.to_k{SECOND}"] @ factors[
        f"transformer_blocks.0.attn.to_k{FIRST}"
    ])  # fmt: skip


def test_a_layer_without_a_name_there_is_named() -> None:
    layers = Layers(["transformer_blocks.0.norm1.linear"], ())
    with pytest.raises(CdmError, match=r"transformer_blocks\.0\.norm1\.linear has no name in ComfyUI"):
        for_comfyui(get_family("sd3"), layers, factors_of(layers))


def test_an_older_lora_with_alpha_in_its_header_gets_its_strength(tmp_path: Path) -> None:
    weights = {f"transformer.a{end}": torch.ones(2, 2) for end in (FIRST, SECOND)}
    header = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(weights, path, metadata={"lora_adapter_metadata": header})
    factors, config = read_lora(tmp_path)
    assert factors[f"a{FIRST}"].unique().tolist() == [1]
    assert factors[f"a{SECOND}"].unique().tolist() == [2]
    assert config == {"r": 2, "lora_alpha": 2}
    save_file(weights, path)
    with pytest.raises(CdmError, match="not a readable LoRA"):
        read_lora(tmp_path)


def test_a_file_for_comfyui_is_no_student(tmp_path: Path) -> None:
    save_file({f"diffusion_model.a{FIRST}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CdmError, match=r"a\.safetensors: a LoRA for ComfyUI: give its student"):
        find_student(tmp_path / "a.safetensors")
