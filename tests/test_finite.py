"""Numbers that are not finite end the stage that makes them, with the part that is at fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm.data.prompt_set import OnlinePrompts, PromptSet
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.handover.drawing import draw_pictures
from cdm.models.manifest import TeacherManifest, describe
from cdm.params import Params
from tests.inputs import build_prompts, cache_latents, draw_samples
from tests.teachers import change, change_json, copy, poison, weights
from tests.tiny_pipelines import BUILDERS, PROMPTS, TEXT_TOKENS


def stopped(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(CdmError) as error:
        call(*arguments)
    (line,) = str(error.value).splitlines()
    return line


@pytest.fixture
def teacher(tiny_sd3: Path, tmp_path: Path) -> Path:
    return copy(tiny_sd3, tmp_path / "teacher")


def found(folder: Path) -> TeacherManifest:
    return describe("sd3", str(folder), None)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_embeddings_end_the_stage_prompts(
    tiny_params: Params, teacher: Path, tmp_path: Path, tiny_teacher: TeacherManifest, part: str
) -> None:
    name = poison(teacher, part)
    expected = f"{teacher}: {part}: {name} holds numbers that are not finite: get the model again"
    assert stopped(build_prompts, tiny_params, found(teacher), tmp_path / "out") == expected
    assert not (tmp_path / "out").exists()
    online = tiny_params.model_copy(
        update={"prompts": tiny_params.prompts.model_copy(update={"embed": "online"})}
    )
    build_prompts(online, tiny_teacher, tmp_path / "out")
    texts, settings = PromptSet(tmp_path / "out/train"), online.prompts
    encoders = OnlinePrompts(texts, get_family("sd3"), teacher, settings, offload=False)
    assert stopped(encoders.conditioning, [0]) == expected


def test_latents_end_the_stage_latents(tiny_params: Params, teacher: Path, tmp_path: Path) -> None:
    name = poison(teacher, "transformer")
    manifest = found(teacher)
    build_prompts(tiny_params, manifest, tmp_path / "prompts")
    message = stopped(cache_latents, tiny_params, manifest, tmp_path / "prompts", tmp_path / "latents")
    assert message == f"{teacher}: transformer: {name} holds numbers that are not finite: get the model again"
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_samples_of_a_student_end_the_stage_sample_and_the_command(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, part: str
) -> None:
    build_prompts(tiny_params, tiny_teacher, tmp_path / "prompts")
    cache_latents(tiny_params, tiny_teacher, tmp_path / "prompts", tmp_path / "latents")
    student = copy(tiny_teacher.folder(), tmp_path / "student")
    name = poison(student, part)
    arguments = (
        tiny_params,
        tiny_teacher,
        student,
        tmp_path / "prompts",
        tmp_path / "latents",
        tmp_path / "out",
    )
    expected = f"{student}: {part}: {name} holds numbers that are not finite: get the model again"
    assert stopped(draw_samples, *arguments) == expected
    assert not (tmp_path / "out").exists()
    assert stopped(lambda: draw_pictures(student, ["a red one"], 1, device="cpu")) == expected


def test_numbers_that_grow_too_large_in_a_precision_say_so(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = get_family("sd3")
    encode = type(family).encode

    def infinite(*arguments: Any) -> dict[str, Tensor]:
        encoded = encode(*arguments)
        return {**encoded, "pooled_projections": encoded["pooled_projections"] * math.inf}

    monkeypatch.setattr(type(family), "encode", infinite)
    message = stopped(build_prompts, tiny_params, tiny_teacher, tmp_path / "out")
    assert message.startswith(
        f"{tiny_teacher.source}: its pooled_projections are not finite, though all its weights"
    )
    assert "set prompts.precision to fp32" in message


def test_text_encoders_of_another_model_end_the_stage_prompts(
    tiny_params: Params, teacher: Path, tmp_path: Path
) -> None:
    """Each part is whole, but they do not fit."""
    change_json(teacher / "text_encoder_2/config.json", projection_dim=16)
    change(
        weights(teacher, "text_encoder_2"),
        lambda each: {**each, "text_projection.weight": each["text_projection.weight"][:16]},
    )
    message = stopped(build_prompts, tiny_params, found(teacher), tmp_path / "out")
    assert "its text encoders make {" in message
    assert "they are of different models" in message


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_finite_passes_and_a_mask_is_no_number(tiny_pipeline: Callable[[str], Path], name: str) -> None:
    from cdm.families.common import check_finite

    family, folder = get_family(name.removesuffix("_t5")), tiny_pipeline(name)
    pipeline = family.load_pipeline(folder)
    encoded = family.encode(pipeline, PROMPTS, TEXT_TOKENS[name])
    check_finite(encoded, pipeline, folder, "prompts.precision")
    for key, value in encoded.items():
        if value.is_floating_point():
            worse = {**encoded, key: torch.where(torch.ones_like(value).cumsum(-1) == 1, math.nan, value)}
            with pytest.raises(CdmError, match=f"its {key} are not finite, though all its weights are"):
                check_finite(worse, pipeline, folder, "prompts.precision")
