"""The teacher's latents and the sample sets, against what diffusers itself draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cdm.data import sampling
from cdm.data.prompt_set import PromptSet
from cdm.data.store import Store, StoreError
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.randomness import sample_noise
from tests.conftest import make_tiny_params
from tests.inputs import build_prompts, cache_latents, cache_pairs, draw_samples

SHAPE = (4, 8, 8)
PER_PROMPT = 2


@pytest.fixture(scope="module")
def made(tiny_sd3: Path, tiny_teacher: TeacherManifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `prompts`, `latents` and a `student` (a teacher with other weights): read only."""
    folder = tmp_path_factory.mktemp("sampling")
    params = make_tiny_params(tiny_sd3, folder)
    build_prompts(params, tiny_teacher, folder / "prompts")
    cache_latents(params, tiny_teacher, folder / "prompts", folder / "latents")
    family = get_family("sd3")
    transformer = family.load_transformer(tiny_teacher.folder())
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.2)
    family.save_student(transformer, tiny_teacher.folder(), folder / "student")
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for name in ("prompts", "latents", "student"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def draw(params: Params, teacher: TeacherManifest, data: Path, out: str = "samples") -> None:
    draw_samples(params, teacher, data / "student", data / "prompts", data / "latents", data / out)


def load(folder: Path) -> Any:
    """The folder as a user of diffusers loads it."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(
    pipeline: Any, texts: list[str], noise: Tensor, steps: int, scale: float, output: str = "latent"
) -> Tensor:
    """One prompt at a time, as a user would."""
    drawn = [
        pipeline(
            text,
            sigmas=[1 - i / steps for i in range(steps)],
            guidance_scale=scale,
            latents=noise[k : k + 1],
            max_sequence_length=0,
            output_type=output,
        ).images
        for k, text in enumerate(texts)
    ]
    return torch.cat(drawn)


def sample_texts(data: Path) -> list[str]:
    return [text for text in PromptSet(data / "prompts" / "eval").texts for _ in range(PER_PROMPT)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_steps_are_counted_and_spaced() -> None:
    assert sampling.unshifted_sigmas(4) == [1.0, 0.75, 0.5, 0.25]
    assert sampling.unshifted_sigmas(1) == [1.0]
    assert sampling.evaluations(4, 1.0) == 4
    assert sampling.evaluations(4, 2.0) == 8


def test_latents_are_the_guided_teachers(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    store = Store(data / "latents")
    store.verify()
    rows = store.all()
    assert rows["prompt"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(rows["noise"], sample_noise(0, range(6), SHAPE))
    expected = by_diffusers(load(tiny_teacher.folder()), sample_texts(data), rows["noise"], 4, 3.0)
    torch.testing.assert_close(rows["latents"], expected, atol=1e-4, rtol=1e-3)
    assert {
        "steps": 4,
        "evaluations": 8,
        "guidance_scale": 3.0,
        "per_prompt": 2,
    }.items() <= store.metadata.items()
    assert store.metadata["prompts_sha256"] == PromptSet(data / "prompts" / "eval").sha256


def test_an_unguided_teacher_costs_one_evaluation_a_step(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    unguided = tiny_params.model_copy(
        update={"teacher": tiny_params.teacher.model_copy(update={"guidance_scale": 1.0})}
    )
    cache_latents(unguided, tiny_teacher, data / "prompts", data / "plain")
    store = Store(data / "plain")
    assert store.metadata["evaluations"] == 4
    rows = store.all()
    expected = by_diffusers(load(tiny_teacher.folder()), sample_texts(data), rows["noise"], 4, 1.0)
    torch.testing.assert_close(rows["latents"], expected, atol=1e-4, rtol=1e-3)


def test_training_pairs_are_of_training_prompts_and_of_noise_of_their_own(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    wanted = tiny_params.model_copy(
        update={"latents": tiny_params.latents.model_copy(update={"train_pairs": 7})}
    )
    cache_pairs(wanted, tiny_teacher, data / "prompts", data / "pairs")
    store, train = Store(data / "pairs"), PromptSet(data / "prompts" / "train")
    rows = store.all()
    assert store.metadata["prompts_sha256"] == train.sha256
    assert sorted(rows["prompt"][:5].tolist()) == list(range(5)), "every prompt before one comes again"
    evaluation = Store(data / "latents").all()["noise"].flatten(1)
    assert torch.cdist(rows["noise"].flatten(1), evaluation).min() > 1
    texts = [train.texts[k] for k in rows["prompt"].tolist()]
    expected = by_diffusers(load(tiny_teacher.folder()), texts[:2], rows["noise"][:2], 4, 3.0)
    torch.testing.assert_close(rows["latents"][:2], expected, atol=1e-4, rtol=1e-3)


def test_without_training_pairs_there_is_an_empty_folder(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    shutil.copytree(data / "latents", data / "pairs")
    cache_pairs(tiny_params, tiny_teacher, data / "prompts", data / "pairs")
    assert list((data / "pairs").iterdir()) == []


class Interrupting:
    """Stands in for the family's `sample` and is interrupted once, at call number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        family = get_family("sd3")
        self.original, self.at, self.calls = family.sample, at, 0
        monkeypatch.setattr(type(family), "sample", self)

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.original(*arguments)


def test_interrupted_latents_are_resumed(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "shard_rows", lambda _: 2)
    sample = Interrupting(monkeypatch, at=3)  # two batches of two are done
    again = data / "again"
    with pytest.raises(KeyboardInterrupt):
        cache_latents(tiny_params, tiny_teacher, data / "prompts", again)
    assert not again.exists()
    cache_latents(tiny_params, tiny_teacher, data / "prompts", again)
    assert sample.calls == 4, "only the last batch was left to draw"
    for name, tensor in Store(data / "latents").all().items():
        assert torch.equal(Store(again).all()[name], tensor)


def test_sets_are_what_diffusers_draws_from_the_same_noise(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    draw(tiny_params, tiny_teacher, data)
    noise = Store(data / "latents").all()["noise"]
    student, teacher = load(data / "student"), load(tiny_teacher.folder())
    for model, pipeline, steps, scale, cost in (
        ("student", student, 1, 1.0, 1),
        ("student", student, 2, 1.0, 2),
        ("teacher", teacher, 1, 3.0, 2),
        ("teacher", teacher, 4, 3.0, 8),
    ):
        store = Store(data / "samples" / model / f"steps{steps}")
        store.verify()
        assert [store.metadata[name] for name in ("steps", "evaluations", "guidance_scale")] == [
            steps,
            cost,
            scale,
        ]
        assert store.metadata["prompts_sha256"] == PromptSet(data / "prompts" / "eval").sha256
        rows = store.all()
        expected = by_diffusers(pipeline, sample_texts(data), noise, steps, scale)
        torch.testing.assert_close(rows["latents"], expected, atol=1e-4, rtol=1e-3)
        pictures = by_diffusers(pipeline, sample_texts(data), noise, steps, scale, "pt")
        assert rows["images"].shape == (6, 3, 32, 32)
        assert (rows["images"] - pictures * 255).abs().max() < 0.6, "rounded to the nearest of 256 levels"
    assert sorted(path.name for path in (data / "samples" / "teacher").iterdir()) == ["steps1", "steps4"]


def test_the_teachers_full_length_is_not_drawn_again(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Interrupting(monkeypatch)
    both = tiny_params.model_copy(
        update={"sample": tiny_params.sample.model_copy(update={"steps": [1], "teacher_steps": [4]})}
    )
    draw(both, tiny_teacher, data)
    assert sample.calls == 3, "three batches of the student, none of the teacher"
    full = Store(data / "samples" / "teacher" / "steps4").all()["latents"]
    assert torch.equal(full, Store(data / "latents").all()["latents"])


def test_samples_are_the_same_bytes_again(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    draw(tiny_params, tiny_teacher, data)
    draw(tiny_params, tiny_teacher, data, out="again")
    first = tree(data / "samples")
    assert tree(data / "again") == first
    draw(tiny_params, tiny_teacher, data)
    assert tree(data / "samples") == first
    assert not list(data.glob(".*.partial"))


def test_pictures_are_the_first_sample_of_each_prompt(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    draw(tiny_params, tiny_teacher, data)
    names = sorted(path.name for path in (data / "samples" / "pictures").iterdir())
    assert names == [
        f"00{prompt}-{name}.png"
        for prompt in range(2)
        for name in ("student-steps1", "student-steps2", "teacher-steps1", "teacher-steps4")
    ]
    with Image.open(data / "samples" / "pictures" / "001-student-steps2.png") as picture:
        assert picture.info == {"prompt": "a pink nine on gray paper", "steps": "2", "seed": "0"}
        pixels = torch.tensor(list(picture.get_flattened_data())).reshape(32, 32, 3)
    stored = Store(data / "samples" / "student" / "steps2").rows([1 * PER_PROMPT])["images"][0]
    assert torch.equal(pixels.permute(2, 0, 1), stored.long())


def test_interrupted_samples_are_resumed(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tiny_params, tiny_teacher, data, out="straight")
    sample = Interrupting(monkeypatch, at=8)  # six batches of the student, one of the teacher are done
    with pytest.raises(KeyboardInterrupt):
        draw(tiny_params, tiny_teacher, data)
    assert not (data / "samples").exists()
    draw(tiny_params, tiny_teacher, data)
    assert sample.calls == 8 + 3, "the student's sets are not drawn again"
    assert tree(data / "samples") == tree(data / "straight")


def test_a_student_that_changed_meanwhile_is_drawn_again(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Interrupting(monkeypatch, at=8)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny_params, tiny_teacher, data)
    shutil.copytree(tiny_teacher.folder(), data / "student", dirs_exist_ok=True)
    draw(tiny_params, tiny_teacher, data)
    assert sample.calls == 8 + 9
    rows = Store(data / "samples" / "student" / "steps1").all()["latents"]
    noise = Store(data / "latents").all()["noise"]
    expected = by_diffusers(load(tiny_teacher.folder()), sample_texts(data), noise, 1, 1.0)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-3)


def test_what_is_missing_or_stale_is_named_before_drawing(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Interrupting(monkeypatch)
    with pytest.raises(CdmError, match="absent: no student there"):
        draw_samples(
            tiny_params, tiny_teacher, data / "absent", data / "prompts", data / "latents", data / "samples"
        )
    with pytest.raises(StoreError, match="nolatents: no such folder"):
        draw_samples(
            tiny_params, tiny_teacher, data / "student", data / "prompts", data / "nolatents", data / "samples"
        )
    other = TeacherManifest(**{**vars(tiny_teacher), "files": {}})
    with pytest.raises(CdmError, match="latents: drawn for another teacher: run the stage `latents` again"):
        draw(tiny_params, other, data)
    shutil.copytree(data / "latents", data / "damaged")
    shard = data / "damaged" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="its hash differs"):
        draw_samples(
            tiny_params, tiny_teacher, data / "student", data / "prompts", data / "damaged", data / "samples"
        )
    fewer = tiny_params.model_copy(update={"prompts": tiny_params.prompts.model_copy(update={"eval_count": 2})})
    build_prompts(fewer, tiny_teacher, data / "prompts")
    with pytest.raises(CdmError, match="latents: drawn for other prompts"):
        draw(tiny_params, tiny_teacher, data)
    assert sample.calls == 0


EDITS = [
    ("per_prompt", 3, "changed since it was written"),
    ("per_prompt", 0, "changed since it was written"),
    ("per_prompt", "2", "per_prompt is '2', expected int"),
    ("steps", 0, "changed since it was written"),
    ("steps", None, "steps is 'None', expected int"),
    ("precision", "fp7", "changed since it was written"),
    ("guidance_scale", "none", "guidance_scale is 'none', expected float"),
    ("guidance_scale", 0.5, "changed since it was written"),
    ("seed", [], "seed is '[]', expected int"),
]


def test_an_edited_cache_is_one_line(tiny_params: Params, tiny_teacher: TeacherManifest, data: Path) -> None:
    manifest = data / "latents" / "manifest.json"
    written = manifest.read_text()
    for name, value, says in EDITS:
        content = json.loads(written)
        content["metadata"][name] = value
        manifest.write_text(json.dumps(content))
        with pytest.raises(CdmError) as error:
            draw(tiny_params, tiny_teacher, data)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert not (data / "samples").exists()


def test_half_precision_draws_nearly_the_same(
    tiny_params: Params, tiny_teacher: TeacherManifest, data: Path
) -> None:
    draw(tiny_params, tiny_teacher, data, "exact")
    exact = Store(data / "latents").all()
    half = tiny_params.model_copy(
        update={"latents": tiny_params.latents.model_copy(update={"precision": "bf16"})}
    )
    cache_latents(half, tiny_teacher, data / "prompts", data / "latents")
    rounded = Store(data / "latents").all()
    assert torch.equal(rounded["noise"], exact["noise"])
    assert rounded["latents"].dtype == torch.float32
    assert 0 < (rounded["latents"] - exact["latents"]).abs().mean() < 0.05
    draw(half, tiny_teacher, data, "rounded")
    for name in ("student/steps2", "teacher/steps1"):
        one, other = (Store(data / folder / name).all()["latents"] for folder in ("exact", "rounded"))
        assert 0 < (one - other).abs().mean() < 0.05


def test_pictures_are_tiled_row_by_row() -> None:
    images = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
    sheet = sampling.tile(images)
    assert sheet.shape == (3, 4, 12)
    assert sheet[0, ::2, ::4].tolist() == [[1, 2, 3], [4, 5, 255]]
    assert torch.equal(sampling.tile(images[:1]), images[0])
