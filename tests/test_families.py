"""The SD3 family against diffusers' own pipeline, and the folders that it reads and writes."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm.errors import CdmError
from cdm.families import Conditioning, Family, get_family
from cdm.flow import euler_step, inference_sigmas

PROMPTS = ["a red three on black paper", "a blue seven on white paper"]
UNSHIFTED = [1.0, 0.75, 0.5, 0.25]
LATENTS = (4, 8, 8)


@pytest.fixture(scope="module")
def family() -> Family:
    return get_family("sd3")


@pytest.fixture(scope="module")
def pipeline(family: Family, tiny_sd3: Path) -> Any:
    return family.load_pipeline(tiny_sd3)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(1))


def direct_call(pipeline: Any, noise: Tensor, guidance_scale: float, output_type: str = "latent") -> Any:
    """What a user of diffusers writes."""
    return pipeline(
        PROMPTS,
        sigmas=UNSHIFTED,
        guidance_scale=guidance_scale,
        latents=noise,
        max_sequence_length=0,
        output_type=output_type,
    ).images


def encoded(family: Family, pipeline: Any) -> tuple[Conditioning, Conditioning]:
    return family.encode(pipeline, PROMPTS, 0), family.encode(pipeline, [""], 0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_velocity_steps_equal_the_pipeline(
    family: Family, pipeline: Any, tiny_sd3: Path, noise: Tensor, guidance_scale: float
) -> None:
    conditioning, empty = encoded(family, pipeline)
    unconditional = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in empty.items()}
    transformer = family.load_transformer(tiny_sd3)
    levels = torch.cat([inference_sigmas(4, family.shift(tiny_sd3)), torch.zeros(1)])
    x = noise
    with torch.no_grad():
        for sigma, next_sigma in pairwise(levels):
            cond = family.velocity(transformer, x, sigma.expand(2), conditioning)
            uncond = family.velocity(transformer, x, sigma.expand(2), unconditional)
            x = euler_step(x, family.guide(cond, uncond, guidance_scale), sigma.expand(2), next_sigma.expand(2))
    expected = direct_call(pipeline, noise, guidance_scale)
    assert (expected - noise).abs().mean() > 0.1, "a test of a network that does nothing would prove nothing"
    torch.testing.assert_close(x, expected, atol=2e-5, rtol=1e-4)


def test_guidance_changes_the_samples(pipeline: Any, noise: Tensor) -> None:
    assert not torch.allclose(direct_call(pipeline, noise, 1.0), direct_call(pipeline, noise, 3.0), atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sample_equals_the_pipeline_called_with_prompts(
    family: Family, pipeline: Any, noise: Tensor, guidance_scale: float
) -> None:
    latents = family.sample(pipeline, noise, *encoded(family, pipeline), UNSHIFTED, guidance_scale)
    torch.testing.assert_close(latents, direct_call(pipeline, noise, guidance_scale), atol=2e-5, rtol=1e-4)


def test_sample_needs_neither_text_encoders_nor_autoencoder(
    family: Family, pipeline: Any, tiny_sd3: Path, noise: Tensor
) -> None:
    bare = family.load_pipeline(tiny_sd3, text=False, image=False)
    assert [bare.text_encoder, bare.tokenizer_2, bare.vae] == [None] * 3
    conditioning, empty = encoded(family, pipeline)
    expected = family.sample(pipeline, noise, conditioning, empty, UNSHIFTED, 3.0)
    assert torch.equal(family.sample(bare, noise, conditioning, empty, UNSHIFTED, 3.0), expected)


def test_decode_equals_the_pipeline(family: Family, pipeline: Any, noise: Tensor) -> None:
    latents = direct_call(pipeline, noise, 1.0)
    images = family.decode(pipeline, latents)
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, direct_call(pipeline, noise, 1.0, output_type="pt"), atol=1e-5, rtol=0)


def test_no_gradient_is_kept_by_encode_and_decode(family: Family, pipeline: Any, noise: Tensor) -> None:
    assert not any(tensor.requires_grad for tensor in family.encode(pipeline, PROMPTS, 0).values())
    assert not family.decode(pipeline, noise).requires_grad


def test_conditioning_has_one_row_a_prompt(family: Family, pipeline: Any) -> None:
    conditioning = family.encode(pipeline, PROMPTS, 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in conditioning.items()}
    assert shapes == {"encoder_hidden_states": (2, 8, 64), "pooled_projections": (2, 64)}
    assert family.encode(pipeline, PROMPTS, 5)["encoder_hidden_states"].shape == (2, 13, 64)
    assert family.encode(pipeline, PROMPTS)["encoder_hidden_states"].shape == (2, 8, 64)


def test_shapes_and_shift_come_from_the_configs(family: Family, tiny_sd3: Path, tmp_path: Path) -> None:
    for name in ("transformer", "scheduler"):
        (tmp_path / name).mkdir()
        for config in (tiny_sd3 / name).glob("*.json"):
            shutil.copy(config, tmp_path / name)
    assert family.latent_shape(tmp_path) == LATENTS
    assert family.shift(tmp_path) == 3.0
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": True}))
    assert family.shift(tmp_path) == pytest.approx(math.exp(0.5 + (16 - 256) * 0.65 / 3840))


def test_a_student_is_a_complete_folder(family: Family, tiny_sd3: Path, tmp_path: Path, noise: Tensor) -> None:
    from diffusers import StableDiffusion3Pipeline

    transformer = family.load_transformer(tiny_sd3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.1)
    for _ in range(2):  # the second replaces the first
        family.save_student(transformer, tiny_sd3, tmp_path / "student")
    student = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "student", text_encoder_3=None, tokenizer_3=None
    )
    student.set_progress_bar_config(disable=True)
    for saved, trained in zip(student.transformer.parameters(), transformer.parameters(), strict=True):
        assert torch.equal(saved, trained)
    shutil.rmtree(tmp_path / "student" / "transformer")
    others = {path.relative_to(tiny_sd3) for path in tiny_sd3.rglob("*") if "transformer" not in path.parts}
    assert {path.relative_to(tmp_path / "student") for path in (tmp_path / "student").rglob("*")} == others
    assert direct_call(student, noise, 1.0).isfinite().all()


def test_lora_targets_are_layers_of_the_transformer(family: Family, tiny_sd3: Path) -> None:
    names = [name for name, _ in family.load_transformer(tiny_sd3).named_modules()]
    for target in family.lora_targets:
        assert any(name.endswith("." + target) for name in names), target


@pytest.mark.parametrize("part", ["model_index.json", "transformer/diffusion_pytorch_model.safetensors", "vae"])
def test_an_incomplete_folder_is_a_one_line_error(
    family: Family, tiny_sd3: Path, tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_sd3, folder)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(CdmError, match="broken") as error:
        family.load_pipeline(folder)
    assert len(str(error.value).splitlines()) == 1


def test_t5_without_tokens_is_an_error(family: Family, pipeline: Any) -> None:
    class WithT5:
        text_encoder_3 = torch.nn.Linear(1, 1)

    with pytest.raises(CdmError, match="max_sequence_length is 0"):
        family.encode(WithT5(), PROMPTS, 0)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(CdmError, match=r"unknown family 'dalle'.*sd3"):
        get_family("dalle")
