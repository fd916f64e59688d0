"""A teacher that is not what its configs say is refused by the first stage, in a line that says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdm.errors import CdmError
from cdm.families import Family, get_family
from cdm.families.folder import parts
from cdm.models import parts as checks
from cdm.models.manifest import TeacherManifest, describe
from cdm.models.parts import check_parts, read_headers
from tests.metric_models import write_vocabulary
from tests.teachers import Tensors, change, change_json, copy, poison, weights
from tests.tiny_pipelines import BUILDERS, RESOLUTION

MODELS = {
    name: [*encoders, "transformer", "vae"]
    for name, encoders in {
        "sd3": ["text_encoder", "text_encoder_2"],
        "sd3_t5": ["text_encoder", "text_encoder_2", "text_encoder_3"],
        "longcat": ["text_encoder"],
        "flux": ["text_encoder", "text_encoder_2"],
        "qwen_image": ["text_encoder"],
        "z_image": ["text_encoder"],
    }.items()
}
"""Parts with weights, by pipeline."""


def family(name: str) -> Family:
    return get_family(name.removesuffix("_t5"))


def found(name: str, folder: Path) -> TeacherManifest:
    return describe(name.removesuffix("_t5"), str(folder), None, RESOLUTION)


def refused(name: str, folder: Path) -> str:
    """The line with which the stage `teacher` ends."""
    with pytest.raises(CdmError) as error:
        found(name, folder)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    return message


def compared(folder: Path, part: str, header: Any) -> str:
    """What is said of a part whose files have these tensors; empty if they are those of its model."""
    try:
        checks._check_tensors(folder, part, *parts(folder)[part], header)
    except CdmError as error:
        return str(error)
    return ""


@pytest.fixture
def of(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline, by its name."""
    return lambda name: copy(tiny_pipeline(name), tmp_path / name)


def test_every_part_of_every_pipeline_is_looked_at() -> None:
    assert MODELS.keys() == BUILDERS.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_one_tensor_less_in_any_part_is_named(of: Callable[[str], Path], name: str) -> None:
    folder = of(name)
    assert found(name, folder).parameters > 0, "whole, it is taken"
    headers = read_headers(folder)
    assert sorted(headers) == sorted(MODELS[name])
    for part, header in headers.items():
        for tensor in (min(header), max(header)):
            message = compared(folder, part, {key: value for key, value in header.items() if key != tensor})
            assert re.search(rf"{part}: its tensors are not those of the \w+ .*: \d missing \(", message)
    (path,) = (folder / MODELS[name][0]).glob("*.safetensors")
    change(path, lambda tensors: dict(list(tensors.items())[1:]))
    assert f"{folder}/{MODELS[name][0]}: its tensors are not those of the " in refused(name, folder)


@pytest.mark.parametrize("name", ["sd3_t5", "z_image"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda each: {**each, "more.weight": ("F32", (2,))}, r"1 extra \(.*more\.weight\)"),
        (
            lambda each: {name: (kind, (*shape, 3)) for name, (kind, shape) in each.items()},
            r"of another shape \(.*is \(",
        ),
        (
            lambda each: {name: ("I8", shape) for name, (_, shape) in each.items()},
            "integers, where the model has",
        ),
        (lambda each: {name: ("F8_E4M3", shape) for name, (_, shape) in each.items()}, ""),
    ],
)
def test_other_tensors_in_any_part_are_named(
    of: Callable[[str], Path], name: str, changed: Callable[[Any], Any], text: str
) -> None:
    folder = of(name)
    for part, header in read_headers(folder).items():
        message = compared(folder, part, changed(header))
        assert re.search(f"{part}: .*{text}" if text else "^$", message)
        assert len(message) < 600


def fused(folder: Path) -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    model.fuse_qkv_projections()
    model.save_pretrained(folder / "transformer")


def with_lora(folder: Path) -> None:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    model = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    model.fuse_lora()
    model.save_pretrained(folder / "transformer")


def renamed(prefix: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        change(
            weights(folder, "transformer"),
            lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()},
        )

    return rename


@pytest.mark.parametrize(
    ("broken", "cure"),
    [
        (fused, "its projections are fused: call unfuse_qkv_projections()"),
        (with_lora, "saved with a LoRA in it: call unload_lora_weights() after fuse_lora()"),
        (
            renamed("model.diffusion_model."),
            "in the layout of another tool: get the model as a diffusers folder",
        ),
        (renamed("module."), "saved from inside a wrapper: save the model itself"),
    ],
)
def test_what_to_do_is_said(of: Callable[[str], Path], broken: Callable[[Path], None], cure: str) -> None:
    folder = of("sd3")
    broken(folder)
    message = refused("sd3", folder)
    assert f"{folder}/transformer: its tensors are not those of the SD3Transformer2DModel" in message
    assert cure in message
    assert len(message) < 600


def test_weights_of_integers_are_refused(of: Callable[[str], Path]) -> None:
    folder = of("flux")

    def rounded(tensors: Tensors) -> Tensors:
        return {name: value.to(torch.int8) for name, value in tensors.items()}

    change(weights(folder, "transformer"), rounded)
    assert "/transformer: context_embedder.bias, " in refused("flux", folder)
    assert "integers, where the model has floating point" in refused("flux", folder)


def test_an_autoencoder_of_numbers_that_are_none_is_refused(of: Callable[[str], Path]) -> None:
    """Nothing else would notice before the samples are decoded, after the training."""
    folder = of("sd3")
    name = poison(folder, "vae")
    path = weights(folder, "vae")
    assert refused("sd3", folder) == f"{path}: {name} holds numbers that are not finite: get the model again"


@pytest.mark.parametrize("name", BUILDERS)
def test_a_tokenizer_without_its_files_is_refused(of: Callable[[str], Path], name: str) -> None:
    folder = of(name)

    def problem(part: Path) -> str:
        with pytest.raises(CdmError) as error:
            checks._check_tokenizer(folder, part.name, *parts(folder)[part.name], family(name))
        return str(error.value)

    for part in sorted(folder.glob("tokenizer*")):
        kept = {path: path.read_bytes() for path in part.iterdir()}
        (part / "tokenizer.json").unlink()
        assert problem(part).startswith(f"{part}: has no ")
        (part / "tokenizer.json").write_text("{")
        assert problem(part).startswith(f"{part}: cannot be loaded (")
        (part / "tokenizer.json").write_bytes(kept[part / "tokenizer.json"])
        (part / "tokenizer_config.json").unlink()
        assert problem(part) == f"{part}: has no tokenizer_config.json: get the model again"
    (part / "tokenizer.json").unlink()
    assert refused(name, folder)


def test_a_tokenizer_in_two_files_needs_both(of: Callable[[str], Path]) -> None:
    folder = of("qwen_image")
    part = folder / "tokenizer"
    write_vocabulary(part)
    (part / "tokenizer.json").unlink()
    found("qwen_image", folder)
    (part / "merges.txt").unlink()
    assert refused("qwen_image", folder) == f"{part}: has no merges.txt: get the model again"


def test_a_tokenizer_of_another_model_is_refused(of: Callable[[str], Path], tiny_pipeline: Any) -> None:
    folder = of("z_image")
    shutil.copy(tiny_pipeline("qwen_image") / "tokenizer/tokenizer.json", folder / "tokenizer")
    assert "but its text encoder knows" in refused("z_image", folder)


def test_a_pipeline_that_needs_a_chat_template_is_refused_without(of: Callable[[str], Path]) -> None:
    folder = of("z_image")
    (folder / "tokenizer/chat_template.jinja").unlink()
    assert "tokenizer: has no chat template (chat_template.jinja)" in refused("z_image", folder)


@pytest.mark.parametrize(
    ("name", "part", "text"),
    [
        ("sd3_t5", "tokenizer_3", "its tokenizer_3 is null, though text_encoder_3 is there, which needs it"),
        ("sd3_t5", "text_encoder_3", "its text_encoder_3 is null, though tokenizer_3 is there, which needs it"),
        ("sd3", "tokenizer_2", "its tokenizer_2 is null, but the family sd3 needs one"),
        ("flux", "text_encoder_2", "its text_encoder_2 is null, but the family flux needs one"),
        ("z_image", "vae", "its vae is null, but the family z_image needs one"),
        ("longcat", "transformer", "its transformer is null, but the family longcat needs one"),
        ("qwen_image", "scheduler", "its scheduler is null, but the family qwen_image needs one"),
    ],
)
def test_a_part_that_is_null_is_named(of: Callable[[str], Path], name: str, part: str, text: str) -> None:
    folder = of(name)
    change_json(folder / "model_index.json", **{part: [None, None]})
    assert text in refused(name, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index[part]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert text in refused(name, folder), "absent is null"


@pytest.mark.parametrize(
    ("path", "values", "text"),
    [
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "its scheduler is a DDIMScheduler"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "its transformer is a Flux"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderOfTomorrow"]}, "this version of diffusers does not"),
        ("model_index.json", {"text_encoder": ["mine", "Encoder"]}, "text_encoder: holds no weights"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "by its config.json, but a SD3Trans"),
        ("transformer/config.json", {"num_layers": 3}, "transformer: its tensors are not those of the SD3Trans"),
        ("transformer/config.json", {"num_layers": "three"}, "transformer/config.json: describes no SD3Trans"),
        ("transformer/config.json", {"quantization_config": {"bits": 4}}, "transformer: is quantized"),
        ("text_encoder/config.json", {"quantization_config": {"bits": 8}}, "text_encoder: is quantized"),
        ("text_encoder/config.json", {"hidden_size": 16}, "text_encoder: its tensors are not those of the CLIP"),
        ("text_encoder/config.json", {"num_hidden_layers": "two"}, "text_encoder/config.json: describes no CLIPText"),
        ("vae/config.json", {"latent_channels": 8}, "vae: its tensors are not those of the AutoencoderKL"),
        ("vae/config.json", {"down_block_types": ["NoSuchBlock"]}, "vae/config.json: describes no AutoencoderKL"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_named(
    of: Callable[[str], Path], path: str, values: dict[str, Any], text: str
) -> None:
    folder = of("sd3")
    change_json(folder / path, **values)
    assert text in refused("sd3", folder)


@pytest.mark.parametrize(("name", "other"), [("sd3", "flux"), ("flux", "sd3"), ("z_image", "sd3")])
def test_an_autoencoder_of_another_model_is_refused(
    of: Callable[[str], Path], tiny_pipeline: Callable[[str], Path], name: str, other: str
) -> None:
    folder = of(name)
    shutil.rmtree(folder / "vae")
    shutil.copytree(tiny_pipeline(other) / "vae", folder / "vae")
    channels = {"sd3": 4, "flux": 16}[other]
    assert f"its transformer does not draw the {channels} channels of its autoencoder" in refused(name, folder)


def test_an_adapter_beside_the_weights_is_refused(of: Callable[[str], Path]) -> None:
    """transformers would load it into the text encoder, without a word."""
    folder = of("sd3")
    (folder / "text_encoder_2/adapter_config.json").write_text("{}")
    assert "text_encoder_2: holds an adapter (adapter_config.json)" in refused("sd3", folder)


def test_a_head_that_no_embedding_goes_through_is_no_fault(of: Callable[[str], Path]) -> None:
    folder = of("z_image")
    change(weights(folder, "text_encoder"), lambda each: {**each, "lm_head.weight": torch.zeros(2, 32)})
    assert found("z_image", folder)


NEWER = re.compile(r"^(?!visual|lm_head)")

PUBLISHED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "z_image": ("text_encoder", lambda plain: {f"model.{key}": value for key, value in plain.items()}),
    "flux": (
        "text_encoder",
        lambda plain: (
            {f"text_model.{key}": value for key, value in plain.items()}
            | {"text_model.embeddings.position_ids": torch.arange(8)[None]}
        ),
    ),
    "sd3": (
        "text_encoder",
        lambda plain: (
            {
                key if key.startswith("text_projection") else f"text_model.{key}": value
                for key, value in plain.items()
            }
            | {"text_model.embeddings.position_ids": torch.arange(8)[None]}
        ),
    ),
    "sd3_t5": (
        "text_encoder_3",
        lambda plain: plain | {"encoder.embed_tokens.weight": plain["shared.weight"].clone()},
    ),
    "longcat": (
        "text_encoder",
        lambda plain: {NEWER.sub(r"model.language_model.\g<0>", key): value for key, value in plain.items()},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_names_that_the_libraries_know_are_no_fault(of: Callable[[str], Path], name: str) -> None:
    """As published models have them, and as other versions save them: renamed, there twice, or no weights at all."""
    folder, part = of(name), PUBLISHED[name][0]

    def older(tensors: Tensors) -> Tensors:
        plain = {re.sub(r"^(model|text_model)\.", "", key): value for key, value in tensors.items()}
        return PUBLISHED[name][1](plain)

    before = {*read_headers(folder)[part]}
    change(weights(folder, part), older)
    assert {*read_headers(folder)[part]} != before
    assert found(name, folder)


def test_shards_are_read_together(of: Callable[[str], Path]) -> None:
    folder = of("sd3_t5")
    for part, stem in (("text_encoder_3", "model"), ("transformer", "diffusion_pytorch_model")):
        tensors = load_file(weights(folder, part))
        weights(folder, part).unlink()
        names = sorted(tensors)
        shards = {
            f"{stem}-00001-of-00002.safetensors": names[::2],
            f"{stem}-00002-of-00002.safetensors": names[1::2],
        }
        for shard, inside in shards.items():
            save_file(
                {name: tensors[name] for name in inside}, folder / part / shard, metadata={"format": "pt"}
            )
        placed = {name: shard for shard, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    manifest = found("sd3_t5", folder)
    assert "transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in manifest.files
    change(
        folder / "text_encoder_3/model-00002-of-00002.safetensors", lambda each: dict(list(each.items())[:-1])
    )
    assert "text_encoder_3: its tensors are not those of the T5EncoderModel" in refused("sd3_t5", folder)


def test_what_was_checked_is_not_checked_again(
    of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdm.models import manifest
    from cdm.system.files import Memory

    folder, memory, checked = of("sd3"), Memory(), list[Path]()

    def check(folder: Path, family: Family, headers: Any) -> None:
        checked.append(folder)
        check_parts(folder, family, headers)

    monkeypatch.setattr(manifest, "check_parts", check)
    for _ in range(2):
        describe("sd3", str(folder), None, memory=memory)
    assert len(checked) == 1
    change(weights(folder, "text_encoder"), lambda each: dict(list(each.items())[1:]))
    with pytest.raises(CdmError, match="text_encoder: its tensors"):
        describe("sd3", str(folder), None, memory=memory)
