"""Each family against diffusers' own pipeline, on tiny ones of the real classes, and the folders that it writes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import Conditioning, Family, family_names, family_of_pipeline, get_family
from cdm.families.base import expand_to_batch
from cdm.flow import inference_sigmas
from cdm.handover.adapters import for_comfyui
from cdm.params import Lora
from cdm.rollout import integrate
from cdm.training.networks import FullNetworks, LoraNetworks, Networks
from tests import tiny_pipelines
from tests.tiny_pipelines import BUILDERS, PROMPTS, RESOLUTION, TEXT_TOKENS

UNSHIFTED = [1.0, 0.75, 0.5, 0.25]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline with its family."""

    name: str
    family: Family
    folder: Path
    pipeline: Any
    reference: Any
    """The same pipeline, as diffusers loads it: to compare with."""

    @property
    def noise(self) -> Tensor:
        shape = self.family.latent_shape(self.folder, RESOLUTION)
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))

    @property
    def shift(self) -> float:
        return self.family.shift(self.folder, RESOLUTION)

    def encode(self, prompts: list[str]) -> Conditioning:
        return self.family.encode(self.pipeline, prompts, TEXT_TOKENS[self.name])

    def drawn(self, guidance_scale: float, output_type: str = "latent", pipeline: Any = None) -> Tensor:
        """What a user of diffusers gets."""
        return tiny_pipelines.call(
            self.name,
            pipeline or self.reference,
            PROMPTS,
            self.noise,
            UNSHIFTED,
            guidance_scale,
            output_type,
        )


def plain(family: Family, folder: Path) -> Any:
    """A folder's pipeline, loaded without this project."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, value in index.items() if isinstance(value, list) and value[0] is None]
    pipeline = getattr(diffusers, family.pipeline_class_name).from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def cases(tiny_pipeline: Callable[[str], Path]) -> Callable[[str], Case]:
    @cache
    def loaded(name: str) -> Case:
        folder, family = tiny_pipeline(name), get_family(name.removesuffix("_t5"))
        reference = plain(family, folder)
        # Qwen-Image's scheduler ends its levels at 0.02; a student's does not: `shift_terminal` in the family.
        reference.scheduler.register_to_config(shift_terminal=None)
        return Case(name, family, folder, family.load_pipeline(folder), reference)

    return loaded


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def test_there_is_a_tiny_pipeline_of_each_family() -> None:
    assert {name.removesuffix("_t5") for name in BUILDERS} == set(family_names())
    for name in family_names():
        assert get_family(name).name == name
        assert family_of_pipeline(get_family(name).pipeline_class_name).name == name


def test_a_family_is_imported_when_it_is_asked_for() -> None:
    sys.modules.pop("cdm.families.flux", None)
    get_family("sd3")
    assert "cdm.families.flux" not in sys.modules


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_velocity_steps_equal_the_pipeline(case: Case, guidance_scale: float) -> None:
    conditioning, empty = case.encode(PROMPTS), expand_to_batch(case.encode([""]), 2)
    transformer = case.family.load_transformer(case.folder)

    def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        cond = case.family.velocity(transformer, x, sigma, conditioning)
        return case.family.guide(cond, case.family.velocity(transformer, x, sigma, empty), guidance_scale)

    expected = case.drawn(guidance_scale)
    assert (expected - case.noise).abs().mean() > 0.1, "a network that does nothing would prove nothing"
    x = integrate(velocity, case.noise, conditioning, inference_sigmas(4, case.shift))
    torch.testing.assert_close(x, expected, **CLOSE)


def test_guidance_and_prompts_change_the_samples(case: Case) -> None:
    assert (case.drawn(1.0) - case.drawn(3.0)).abs().max() > 1e-3
    conditioning, transformer = case.encode(PROMPTS), case.pipeline.transformer
    swapped = {name: tensor.flip(0) for name, tensor in conditioning.items()}
    sigma = torch.tensor([0.9, 0.4])
    with torch.no_grad():
        one, other = (
            case.family.velocity(transformer, case.noise, sigma, each) for each in (conditioning, swapped)
        )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sample_equals_the_pipeline_called_with_prompts(case: Case, guidance_scale: float) -> None:
    latents = case.family.sample(
        case.pipeline, case.noise, case.encode(PROMPTS), case.encode([""]), UNSHIFTED, guidance_scale
    )
    torch.testing.assert_close(latents, case.drawn(guidance_scale), **CLOSE)


def test_sample_needs_neither_text_encoders_nor_autoencoder(case: Case) -> None:
    bare = case.family.load_pipeline(case.folder, text=False, image=False)
    assert [bare.text_encoder, bare.tokenizer, bare.vae] == [None] * 3
    conditioning, empty = case.encode(PROMPTS), case.encode([""])
    expected = case.family.sample(case.pipeline, case.noise, conditioning, empty, UNSHIFTED, 3.0)
    assert torch.equal(
        case.family.sample(bare, case.noise, conditioning, empty, UNSHIFTED, 3.0),
        expected,
    )


def test_samples_in_bfloat16_are_nearly_those_in_float32(case: Case) -> None:
    half = case.family.load_pipeline(case.folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    conditioning = case.family.encode(half, PROMPTS, TEXT_TOKENS[case.name])
    empty = case.family.encode(half, [""], TEXT_TOKENS[case.name])
    noise = case.noise.bfloat16()
    latents = case.family.sample(half, noise, conditioning, empty, UNSHIFTED, 2.0)
    assert (latents.float() - case.drawn(2.0)).abs().mean() < 0.05
    assert case.family.decode(half, latents).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms, in autocast on a CPU
def test_networks_in_bfloat16_say_nearly_what_they_say_in_float32(case: Case) -> None:
    """The teacher's weights are bfloat16, the student's float32; embeddings and latents come as float32."""
    transformer = case.family.load_transformer(case.folder)
    point = (case.noise, torch.tensor([0.9, 0.4]), case.encode(PROMPTS))
    with torch.no_grad():
        expected = case.family.velocity(transformer, *point)
        networks = FullNetworks(case.family, transformer, autocast=torch.bfloat16)
        for role in ("teacher", "student", "fake"):
            velocity = networks.velocity(role, *point)
            assert velocity.dtype == torch.float32
            assert (velocity - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_encoding_needs_neither_transformer_nor_autoencoder(case: Case) -> None:
    bare = case.family.load_pipeline(case.folder, image=False, transformer=False)
    assert bare.vae is None
    assert (bare.transformer is None) == (case.name != "sd3"), (
        "without T5, SD3 asks its transformer for a width"
    )
    encoded = case.family.encode(bare, PROMPTS, TEXT_TOKENS[case.name])
    assert all(torch.equal(tensor, encoded[name]) for name, tensor in case.encode(PROMPTS).items())


def test_decode_equals_the_pipeline(case: Case) -> None:
    images = case.family.decode(case.pipeline, case.drawn(1.0))
    assert images.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 1e-3
    torch.testing.assert_close(images, case.drawn(1.0, output_type="pt"), atol=1e-5, rtol=0)


def test_no_gradient_is_kept_by_encode_and_decode(case: Case) -> None:
    assert not any(tensor.requires_grad for tensor in case.encode(PROMPTS).values())
    assert not case.family.decode(case.pipeline, case.noise).requires_grad


def test_a_prompt_is_encoded_as_alone_and_its_list_is_left_as_it_was(case: Case) -> None:
    """Rows have one shape, whatever they are encoded with, so that they can be stored and mixed."""
    prompts = [*PROMPTS, ""]
    together = case.encode(prompts)
    assert prompts == [*PROMPTS, ""]
    for row, prompt in enumerate(prompts):
        for name, tensor in case.encode([prompt]).items():
            torch.testing.assert_close(tensor[0], together[name][row], atol=1e-5, rtol=1e-4)


def test_a_batch_of_velocities_is_those_of_its_samples(case: Case) -> None:
    """Each has its own prompt, of its own length, and its own level; and levels matter."""
    conditioning, sigma, transformer = case.encode(PROMPTS), torch.tensor([0.9, 0.4]), case.pipeline.transformer
    with torch.no_grad():
        together = case.family.velocity(transformer, case.noise, sigma, conditioning)
        assert together.shape == case.noise.shape
        for row in range(2):
            alone = {name: tensor[row : row + 1] for name, tensor in conditioning.items()}
            one = case.family.velocity(transformer, case.noise[row : row + 1], sigma[row : row + 1], alone)
            torch.testing.assert_close(one, together[row : row + 1], **CLOSE)
        other = case.family.velocity(transformer, case.noise, 1 - sigma, conditioning)
    assert (other - together).abs().max() > 1e-3


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # autocast leaves norms in float32
@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)])
def test_levels_are_not_rounded_where_the_network_computes_in_bfloat16(case: Case, lora: Lora | None) -> None:
    """Both levels are 0.98046875 in bfloat16. In float32 nothing is changed by it."""
    transformer = case.family.load_transformer(case.folder)
    networks: Networks = (
        FullNetworks(case.family, transformer, autocast=torch.bfloat16)
        if lora is None
        else LoraNetworks(case.family, transformer, lora, seed=0, autocast=torch.bfloat16)
    )
    conditioning = case.encode(PROMPTS)
    with torch.no_grad():
        one, other = (
            networks.velocity("student", case.noise, torch.full((2,), sigma), conditioning)
            for sigma in (0.9795, 0.982)
        )
    assert torch.tensor(0.9795).bfloat16() == torch.tensor(0.982).bfloat16()
    assert not torch.equal(one, other)


def test_a_student_whose_weights_have_other_names_is_not_saved(case: Case, tmp_path: Path) -> None:
    """It would be the teacher where a name is missing."""
    networks = FullNetworks(case.family, case.family.load_transformer(case.folder))
    weights = {name: value.detach() for name, value in networks.parameters("student").items()}
    name = min(weights)
    for wrong in (
        {key: value for key, value in weights.items() if key != name},
        {f"module.{key}" if key == name else key: value for key, value in weights.items()},
        weights | {f"module.{name}": weights[name]},
    ):
        with pytest.raises(CdmError, match=r"^the student cannot be saved: \d parameters are not named"):
            networks.save_student(wrong, case.folder, tmp_path / "student")
    assert not (tmp_path / "student").exists()
    networks.save_student(weights, case.folder, tmp_path / "student")


def test_gradients_reach_the_latents_and_the_weights(case: Case) -> None:
    networks = FullNetworks(case.family, case.family.load_transformer(case.folder), gradient_checkpointing=True)
    x = case.noise.requires_grad_()
    velocity = networks.velocity("student", x, torch.tensor([0.9, 0.4]), case.encode(PROMPTS))
    networks.backward("student", velocity.square().mean())
    assert x.grad is not None
    assert (x.grad != 0).all()
    learnt = [
        value.grad is not None and bool((value.grad != 0).any())
        for value in networks.parameters("student").values()
    ]
    assert sum(learnt) > 0.8 * len(learnt)


def test_an_embedding_is_added_to_what_stands_for_the_prompt(case: Case) -> None:
    conditioning = case.encode(PROMPTS)
    width = case.family.embedding_width(conditioning)
    none = case.family.add_embedding(conditioning, torch.zeros(2, width))
    assert all(torch.equal(none[name], tensor) for name, tensor in conditioning.items())
    some = case.family.add_embedding(conditioning, torch.ones(2, width))
    changed = {name for name, tensor in conditioning.items() if not torch.equal(some[name], tensor)}
    pooled = "pooled_projections"
    assert changed == {pooled if pooled in conditioning else "encoder_hidden_states"}


def test_shapes_and_shift_come_from_the_configs(case: Case, tmp_path: Path) -> None:
    for config in case.folder.glob("*/*.json"):
        (tmp_path / config.parent.name).mkdir(exist_ok=True)
        shutil.copy(config, tmp_path / config.parent.name)
    channels = 4 if case.name == "sd3" else 16
    assert case.family.latent_shape(tmp_path, RESOLUTION) == (channels, 8, 8)
    assert case.family.latent_shape(tmp_path, 40) == (channels, 10, 10)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    static = {**json.loads(scheduler.read_text()), "use_dynamic_shifting": False, "shift": 3.0}
    scheduler.write_text(json.dumps(static))
    assert case.family.shift(tmp_path, RESOLUTION) == 3.0
    ends = {"base_image_seq_len": 16, "max_image_seq_len": 32, "base_shift": 0.5, "max_shift": 1.0}
    scheduler.write_text(json.dumps({**static, "use_dynamic_shifting": True, **ends}))
    assert case.family.shift(tmp_path, RESOLUTION) == pytest.approx(math.exp(0.5)), "16 image tokens"
    assert case.family.shift(tmp_path, 40) == pytest.approx(math.exp(0.5 + 0.5 * 9 / 16)), "25 image tokens"


def test_without_a_resolution_it_is_what_the_model_is_made_for(case: Case) -> None:
    side = 8 if case.family.name == "sd3" else 1024 // 4
    assert case.family.latent_shape(case.folder)[1:] == (side, side)


def test_a_resolution_that_cannot_be_drawn_is_a_line(case: Case) -> None:
    with pytest.raises(CdmError, match=r"^teacher.resolution is 36, but .* multiples of 8 pixels: use 32$"):
        case.family.latent_shape(case.folder, 36)
    if case.name == "sd3_t5":
        with pytest.raises(CdmError, match=r"teacher.resolution is 64, but this model draws up to 48 pixels"):
            case.family.latent_shape(case.folder, 64)


@pytest.mark.parametrize("name", ["longcat", "flux", "qwen_image", "z_image"])
def test_more_text_tokens_than_a_model_takes_are_an_error(cases: Callable[[str], Case], name: str) -> None:
    for tokens in (0, 2000):
        with pytest.raises(
            CdmError, match=rf"^prompts.max_sequence_length is {tokens}: this model takes 1 to \d+"
        ):
            cases(name).family.encode(cases(name).pipeline, PROMPTS, tokens)


def test_t5_without_tokens_is_an_error(cases: Callable[[str], Case]) -> None:
    case = cases("sd3_t5")
    with pytest.raises(CdmError, match="max_sequence_length is 0"):
        case.family.encode(case.pipeline, PROMPTS, 0)
    assert case.family.encode(case.pipeline, PROMPTS)["encoder_hidden_states"].shape == (2, 8 + 256, 64)


def test_sd3_without_t5_needs_no_tokens_for_it(cases: Callable[[str], Case]) -> None:
    case = cases("sd3")
    shapes = {name: tuple(tensor.shape) for name, tensor in case.encode(PROMPTS).items()}
    assert shapes == {"encoder_hidden_states": (2, 8, 64), "pooled_projections": (2, 64)}
    assert case.family.encode(case.pipeline, PROMPTS, 5)["encoder_hidden_states"].shape == (2, 13, 64)
    assert case.family.encode(case.pipeline, PROMPTS)["encoder_hidden_states"].shape == (2, 8, 64)


def test_a_student_is_a_complete_folder(case: Case, tmp_path: Path) -> None:
    """It draws in plain diffusers, with explicit levels, what it draws here."""
    transformer = case.family.load_transformer(case.folder)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.1)
    for _ in range(2):  # the second replaces the first
        case.family.save_student(transformer, case.folder, tmp_path / "student")
    student = plain(case.family, tmp_path / "student")
    for saved, trained in zip(student.transformer.parameters(), transformer.parameters(), strict=True):
        assert torch.equal(saved, trained)
    ours = case.family.load_pipeline(tmp_path / "student")
    latents = case.family.sample(
        ours, case.noise, case.encode(PROMPTS), case.encode([""]), UNSHIFTED, guidance_scale=1.0
    )
    torch.testing.assert_close(case.drawn(1.0, pipeline=student), latents, **CLOSE)
    assert (latents - case.drawn(1.0)).abs().max() > 1e-3, "a student of its own"
    shutil.rmtree(tmp_path / "student" / "transformer")
    others = {
        path.relative_to(case.folder) for path in case.folder.rglob("*") if "transformer" not in path.parts
    }
    assert {path.relative_to(tmp_path / "student") for path in (tmp_path / "student").rglob("*")} == others


def test_lora_targets_are_layers_of_the_blocks(case: Case) -> None:
    model = case.family.load_transformer(case.folder)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for end in [*case.family.attention_layers, *case.family.feed_forward_layers]:
        assert any(fnmatchcase(f".{name}", f"*.{end}") for name in names), end
    ends = case.family.adapted_layers(model, "attention+feed-forward")
    adapted = [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]
    assert all(name.split(".")[1].isdigit() for name in adapted), "in a block of a list of blocks"
    factors = {}
    for name in adapted:
        layer = model.get_submodule(name)
        factors |= {f"{name}.lora_A.weight": torch.ones(2, layer.in_features)}
        factors |= {f"{name}.lora_B.weight": torch.ones(layer.out_features, 2)}
    named = for_comfyui(case.family, model, factors)
    assert sum(value.count_nonzero() for value in named.values()) == sum(
        value.numel() for value in factors.values()
    )


def test_a_lora_loads_here_and_in_diffusers(case: Case, tmp_path: Path) -> None:
    networks = LoraNetworks(
        case.family, case.family.load_transformer(case.folder), Lora(rank=2, alpha=6), seed=0
    )
    weights = networks.parameters("student")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in weights.values():
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
    for folder in (tmp_path / "one", tmp_path / "two"):
        networks.save_student({name: value.detach() for name, value in weights.items()}, case.folder, folder)
    (one,), (two,) = (list(folder.iterdir()) for folder in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()

    ours = case.family.load_pipeline(case.folder, text=False, image=False)
    case.family.load_lora(ours, tmp_path / "one")
    sigma, conditioning = torch.tensor([0.9, 0.4]), case.encode(PROMPTS)
    with torch.no_grad():
        expected = networks.velocity("student", case.noise, sigma, conditioning)
        assert (expected - networks.velocity("teacher", case.noise, sigma, conditioning)).abs().max() > 1e-2
        loaded = case.family.velocity(ours.transformer, case.noise, sigma, conditioning)
    torch.testing.assert_close(loaded, expected, **CLOSE)

    theirs = plain(case.family, case.folder)
    theirs.scheduler.register_to_config(shift_terminal=None)
    if hasattr(theirs, "load_lora_weights"):
        theirs.load_lora_weights(tmp_path / "one")
    else:
        theirs.transformer.load_lora_adapter(tmp_path / "one", weight_name=one.name)
    latents = case.family.sample(ours, case.noise, conditioning, case.encode([""]), UNSHIFTED, 1.0)
    torch.testing.assert_close(case.drawn(1.0, pipeline=theirs), latents, **CLOSE)


@pytest.mark.parametrize("part", ["model_index.json", "transformer/diffusion_pytorch_model.safetensors", "vae"])
def test_an_incomplete_folder_is_a_one_line_error(case: Case, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(case.folder, folder)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(CdmError, match="broken") as error:
        case.family.load_pipeline(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_lora_that_is_none_is_a_one_line_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="cannot be loaded as a LoRA") as error:
        case.family.load_lora(case.family.load_pipeline(case.folder, text=False, image=False), tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(CdmError, match=r"unknown family 'dalle' \(known: .*sd3"):
        get_family("dalle")


@pytest.mark.parametrize("name", BUILDERS)
def test_an_autoencoder_is_loaded_without_a_transformer(
    name: str, tiny_pipeline: Callable[[str], Path]
) -> None:
    """Which is many times as large: pictures while training need none."""
    pipeline = get_family(name.removesuffix("_t5")).load_pipeline(
        tiny_pipeline(name), text=False, transformer=False
    )
    assert pipeline.transformer is None
    assert pipeline.vae is not None
