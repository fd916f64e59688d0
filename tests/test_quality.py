"""The table of figures: against hand-worked values, closed forms, and the miniature's real pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm.errors import CdmError
from cdm.evaluation.distances import frechet_distance
from cdm.evaluation.features import (
    Features,
    JudgeFeatures,
    PixelFeatures,
    all_right,
    attribute_targets,
    attributes_right,
    extract,
    load_extractor,
)
from cdm.evaluation.judge import Judge, JudgeConfig
from cdm.evaluation.quality import Evaluation, expected_at
from cdm.evaluation.samples import WORK, RealPictures, parts, read_real
from cdm.params import Params
from tests.launching import Started
from tests.sample_sets import (
    PER_PROMPT,
    ROOT,
    TEXTS,
    evaluated,
    noise_pictures,
    open_sets,
    parameters,
    write_real,
    write_set,
    write_sets,
)

COLOURS = ("red", "blue", "pink")
PROMPT_OF = torch.arange(len(TEXTS) * PER_PROMPT) // PER_PROMPT


class FirstPixel:
    """Content is the red of the first pixel, style its green; its blue says the colour: 0 red, 1 blue, 2 pink."""

    description = "the first pixel"
    attributes: Mapping[str, Sequence[str]] = {"colour": COLOURS, "animal": ("cat", "dog")}

    def __call__(self, images: Tensor) -> Features:
        pixel = images[:, :, 0, 0].double()
        logits = {"colour": F.one_hot(images[:, 2, 0, 0].long() % 3, 3), "animal": torch.zeros(len(images), 2)}
        return Features(pixel[:, :1], pixel[:, 1:2], logits)


def first_pixels(
    content: Sequence[int], style: Sequence[int] | None = None, colour: Tensor = PROMPT_OF
) -> Tensor:
    """Pictures whose first pixels are as given, the rest noise."""
    images = noise_pictures(99, len(content))
    images[:, 0, 0, 0] = torch.tensor(content, dtype=torch.uint8)
    images[:, 1, 0, 0] = torch.tensor(content if style is None else style, dtype=torch.uint8)
    images[:, 2, 0, 0] = colour.to(torch.uint8)
    return images


REAL = RealPictures(first_pixels([10, 20, 30, 40] * 3), PROMPT_OF)


def measure(folder: Path, params: Params, real: RealPictures | None = REAL, **pictures: Tensor) -> Evaluation:
    return evaluated(params, open_sets(params, write_sets(folder, **pictures), TEXTS), real, FirstPixel())


def test_rows_and_their_figures(tmp_path: Path) -> None:
    quality = measure(tmp_path, parameters()).quality
    assert {model: list(rows) for model, rows in quality.items()} == {
        "student": ["steps1", "steps4"],
        "teacher": ["steps4", "steps50"],
        "real": ["halves"],
    }
    assert [row["evaluations"] for rows in quality.values() for row in rows.values()] == [1, 4, 8, 100, 0]
    figures = {"evaluations", "frechet_distance", "style_distance", "kernel_distance", "attribute_accuracy"}
    figures |= {"precision", "recall", "density", "coverage", "diversity", "count"}
    assert set(quality["teacher"]["steps50"]) == set(quality["real"]["halves"]) == figures
    assert set(quality["student"]["steps4"]) == figures | {"frechet_to_teacher", "style_to_teacher"}
    assert quality["student"]["steps4"]["count"] == 12
    assert quality["real"]["halves"]["count"] == 6
    for row in (row for rows in quality.values() for row in rows.values()):
        assert all(value == float(f"{value:.6g}") for value in row.values())


def test_distances_of_one_feature_by_hand(tmp_path: Path) -> None:
    """In units of the reference's deviation: the squared differences of mean and of deviation."""
    moved = first_pixels([15, 25, 35, 45] * 3, style=[40, 80, 120, 160] * 3)
    row = measure(tmp_path, parameters(), student1=moved).quality["student"]["steps1"]
    variance = 500 / 4 * 12 / 11  # of 10, 20, 30, 40 three times, n - 1
    assert row["frechet_distance"] == pytest.approx(25 / variance, rel=1e-5)
    assert row["style_distance"] == pytest.approx((75**2 + 9 * variance) / variance, rel=1e-5)
    pairs = (3 * 10 + 2 * 20 + 30) / 6 / variance**0.5
    assert row["diversity"] == pytest.approx(pairs, rel=1e-5)


def test_a_student_that_equals_the_teacher(tmp_path: Path) -> None:
    same = first_pixels([11, 23, 37, 38] * 3)
    quality = measure(tmp_path, parameters(), student1=same, teacher50=same).quality
    student, teacher = quality["student"]["steps1"], quality["teacher"]["steps50"]
    assert student["frechet_to_teacher"] == pytest.approx(0, abs=1e-12)
    assert {**teacher, "evaluations": 1}.items() <= student.items()


def test_accuracy_counts_the_attributes_that_prompts_name(tmp_path: Path) -> None:
    """No prompt names an animal, so that the colour alone decides."""
    colour = PROMPT_OF.clone()
    colour[[0, 5, 6]] = (colour[[0, 5, 6]] + 1) % 3
    evaluation = measure(tmp_path, parameters(), student4=first_pixels([10] * 12, colour=colour))
    assert evaluation.quality["student"]["steps4"]["attribute_accuracy"] == 0.75
    assert evaluation.attributes["student"]["steps4"] == {"colour": 0.75}
    # blocks of noise: 2/3, 2/3, 2/3 and 3/3 right; the standard error of their mean
    assert evaluation.errors["student"]["steps4"]["attribute_accuracy"] == pytest.approx(1 / 12, rel=1e-5)
    assert evaluation.quality["real"]["halves"]["attribute_accuracy"] == 1


def test_without_real_pictures_the_teacher_is_the_reference(tmp_path: Path) -> None:
    evaluation = measure(tmp_path, parameters(), real=None)
    quality = evaluation.quality
    assert (evaluation.reference, evaluation.reference_count, evaluation.floor) == ("teacher", 12, {})
    assert set(quality) == {"student", "teacher"}
    full = quality["teacher"]["steps50"]
    assert (full["frechet_distance"], full["style_distance"]) == (0, 0)
    assert "precision" not in full
    row = quality["student"]["steps1"]
    assert row["frechet_distance"] == row["frechet_to_teacher"] > 0


def test_the_same_again_gives_the_same_figures(tmp_path: Path) -> None:
    one, other = measure(tmp_path / "a", parameters()), measure(tmp_path / "b", parameters())
    assert json.dumps(one.quality) == json.dumps(other.quality)
    assert one.errors == other.errors


def test_the_floor_of_perfect_samples_scales_with_the_counts() -> None:
    """Two Gaussian sets of one distribution: the distance of halves predicts that of larger, unequal sets."""
    generator = torch.Generator().manual_seed(0)

    def mean_distance(n: int, m: int) -> float:
        def draw(count: int) -> Tensor:
            return torch.randn(count, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7)

        return sum(frechet_distance(draw(n), draw(m)) for _ in range(150)) / 150

    assert expected_at(mean_distance(150, 150), 150, 200, 300) == pytest.approx(
        mean_distance(200, 300), rel=0.08
    )


def test_sets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    params = parameters()
    folder = write_sets(tmp_path)
    assert [each.steps for each in open_sets(params, folder, TEXTS).sets] == [1, 4, 4, 50]
    more = params.sample.model_copy(update={"teacher_steps": [7]})
    with pytest.raises(CdmError, match=r"teacher.steps7: no such folder"):
        open_sets(params.model_copy(update={"sample": more}), folder, TEXTS)
    with pytest.raises(CdmError, match="student/steps1 holds 12 pictures, but 2 prompts of 4 samples make 8"):
        open_sets(params, folder, TEXTS[:2])
    write_set(folder, "student", 4, noise_pictures(0), prompts="cd" * 32)
    with pytest.raises(CdmError, match="different prompts"):
        open_sets(params, folder, TEXTS)
    write_set(folder, "student", 4, noise_pictures(0), by="ef" * 32)
    with pytest.raises(CdmError, match="by different students"):
        open_sets(params, folder, TEXTS)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("evaluations", None, "evaluations is 'None', expected int"),
        ("evaluations", 3, "not the samples of 4 steps"),
        ("steps", 1, "not the samples of 4 steps"),
        ("steps", "4", "steps is '4', expected int"),
        ("prompts_sha256", 7, "prompts_sha256 is '7', expected str"),
        ("model", [], "model is '[]', expected str"),
    ],
)
def test_an_edited_set_is_one_line(tmp_path: Path, key: str, value: object, says: str) -> None:
    folder = write_sets(tmp_path)
    manifest = folder / "student" / "steps4" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["metadata"][key] = value
    manifest.write_text(json.dumps(content))
    with pytest.raises(CdmError) as error:
        open_sets(parameters(), folder, TEXTS)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_picture_is_not_measured(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    shard = folder / "teacher" / "steps50" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    full = open_sets(parameters(), folder, TEXTS).full
    assert len(full.pictures(range(5))) == 5, "those of another file can be looked at"
    with pytest.raises(CdmError, match=r"teacher/steps50/shard-00001\.safetensors: its hash differs"):
        next(full.batches())


def test_hashes_are_those_of_the_student_and_of_what_it_drew(tmp_path: Path) -> None:
    params = parameters()
    hashes = open_sets(params, write_sets(tmp_path / "a"), TEXTS).hashes
    assert hashes["student"] == "cd" * 32
    assert hashes == open_sets(params, write_sets(tmp_path / "b"), TEXTS).hashes
    other = open_sets(params, write_sets(tmp_path / "c", student4=noise_pictures(99)), TEXTS).hashes
    assert other["student"] == hashes["student"]
    assert other["samples"] != hashes["samples"]


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CdmError, match=r"evaluate.neighbours 6 needs more than 12 samples and 12 reference"):
        measure(tmp_path, parameters(neighbours=6))
    with pytest.raises(
        CdmError, match=r"evaluate.real: pictures of \(3, 16, 16\), but the samples are \(3, 8, 8\)"
    ):
        measure(tmp_path, parameters(), real=RealPictures(noise_pictures(0, 12, size=16), PROMPT_OF))


def test_pictures_are_cut_by_their_bytes() -> None:
    def sizes(side: int, count: int) -> list[int]:
        cut = list(parts(count, (3, side, side)))
        assert [number for part in cut for number in part] == list(range(count))
        assert all(len(part) * 3 * side**2 * WORK <= 2**30 or len(part) == 1 for part in cut)
        return [len(part) for part in cut]

    assert sizes(32, 600) == [256, 256, 88], "the miniature's figures hang on it, in their last digits"
    assert sizes(1024, 5) == [2, 2, 1]
    assert sizes(4096, 2) == [1, 1], "a picture that alone takes more is read alone"


def test_figures_are_those_of_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, params = noise_pictures(0, 13), parameters()
    prompts = [*[text for text in TEXTS for _ in range(PER_PROMPT)], "something else"]
    real = read_real(write_real(tmp_path / "real.safetensors", images, prompts), TEXTS)
    opened = open_sets(params, write_sets(tmp_path / "sets"), TEXTS)
    sizes: list[int] = []

    class Watched(FirstPixel):
        def __call__(self, images: Tensor) -> Features:
            sizes.append(len(images))
            return super().__call__(images)

    whole = evaluated(params, opened, real, Watched())
    assert sizes == [12] * 5
    sizes.clear()
    monkeypatch.setattr("cdm.evaluation.samples.MEMORY", 5 * WORK * images[0].numel())
    assert evaluated(params, opened, real, Watched()) == whole
    assert sizes == [5, 5, 2] * 5


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_evaluation_of_large_pictures_takes_bounded_memory(tmp_path: Path) -> None:
    """12 pictures of 1024 x 1024 in a set: in float64, five times over, they would take 1.5 GB; 6 before a judge,
    whose first layers would take 2 GB."""
    code, said = Started("tests.run_evaluation", tmp_path).finish()
    assert code == 0, said
    for line in said.splitlines():
        if line.startswith("peak"):
            _, what, megabytes = line.split()
            assert float(megabytes) < 900, what
    assert said.count("peak") == 2


def test_real_pictures_of_other_prompts_are_left_aside(tmp_path: Path) -> None:
    images = noise_pictures(0, 5)
    prompts = [TEXTS[1], "something else", TEXTS[0], TEXTS[2], TEXTS[1]]
    real = read_real(write_real(tmp_path / "real.safetensors", images, prompts), TEXTS)
    assert real.prompt.tolist() == [1, 0, 2, 1]
    assert torch.equal(torch.cat([*real.batches()]), images[[0, 2, 3, 4]])


def test_real_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    images = noise_pictures(0, 2)
    some = write_real(tmp_path / "some.safetensors", images, TEXTS[:2])
    with pytest.raises(
        CdmError, match=r"no picture of 1 of the 3 evaluation prompts \(one is 'a pink two on gray"
    ):
        read_real(some, TEXTS)
    floats = write_real(tmp_path / "floats.safetensors", images.float(), TEXTS[:2])
    with pytest.raises(CdmError, match=r"2 prompts and torch.float32 images \(2, 3, 8, 8\)"):
        read_real(floats, TEXTS)
    (tmp_path / "text").write_text("not a safetensors file")
    for missing in ("nothing", "text"):
        with pytest.raises(CdmError, match=rf"evaluate.real: .*{missing}"):
            read_real(tmp_path / missing, TEXTS)


def test_targets_are_whole_words_and_unambiguous() -> None:
    attributes = {"ink": ["red", "sea green", "green"], "digit": ["one", "seven"]}
    prompts = ["A RED one", "a bored stone", "sea-green seven", "red and green", "sea green one, twice one"]
    targets = attribute_targets(prompts, attributes)
    assert targets["ink"].tolist() == [0, -1, 2, -1, -1]
    assert targets["digit"].tolist() == [0, -1, 1, -1, 0]


def test_all_right_means_all_that_are_named() -> None:
    logits = {"ink": torch.eye(3), "digit": torch.eye(3)}
    targets = {"ink": torch.tensor([0, 1, -1]), "digit": torch.tensor([1, -1, -1])}
    right = attributes_right(logits, targets)
    assert right["ink"].tolist()[:2] == [1, 1]
    assert all_right(right)[:2].tolist() == [0, 1]
    assert all_right(right)[2].isnan()


def test_the_judge_as_extractor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Judge(JudgeConfig({"ink": ["red", "blue"]}, widths=(4, 4, 4, 4, 6))).eval().save(tmp_path / "judge")
    extractor = load_extractor(str(tmp_path / "judge"))
    images = noise_pictures(1, 10)
    whole, split = extract(extractor, [images]), extract(extractor, images.split(3))
    assert whole.content.shape == (10, 6)
    assert whole.style.shape == (10, 16)
    assert whole.logits["ink"].shape == (10, 2)
    assert whole.content.dtype == torch.float64
    torch.testing.assert_close(whole.content, split.content, atol=1e-6, rtol=1e-5)
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"damaged")
    for folder in (tmp_path / "judge", tmp_path / "nothing"):
        with pytest.raises(CdmError, match=f"evaluate.judge: {folder} does not hold a judge"):
            load_extractor(str(folder))


def test_pixel_features_tell_layout_from_style() -> None:
    """Mirroring moves what is shown and keeps how; sharpening detail keeps the layout and changes the style."""
    extractor = load_extractor(None)
    assert isinstance(extractor, PixelFeatures)
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(20, 3, 8, 8, generator=generator), scale_factor=4)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 0.2 - 0.1
    plain, detailed = ((255 * (0.2 + 0.6 * coarse + add)).round().byte() for add in (0, checks))
    features, mirrored, sharp = (extractor(images) for images in (plain, plain.flip(3), detailed))
    torch.testing.assert_close(mirrored.style, features.style)
    torch.testing.assert_close(sharp.content, features.content, atol=0.01, rtol=0)
    assert frechet_distance(mirrored.content[:, :2], features.content[:, :2]) > 0.001
    detail = slice(6, 9)  # mean detail of the finest octave
    assert torch.allclose(
        sharp.style[:, detail] - features.style[:, detail], torch.tensor(0.1).double(), atol=0.01
    )
    assert extractor(noise_pictures(0, 2, size=8)).content.shape == (2, 192)


def test_the_miniature_judge_reads_real_pictures_and_sees_blur() -> None:
    texts = (ROOT / "miniature/data/eval.txt").read_text().split("\n")[:-1]
    real = read_real(ROOT / "miniature/data/real.safetensors", texts)
    images, prompt = real.images[::6], real.prompt[::6]
    judge = JudgeFeatures(ROOT / "miniature/judge")
    targets = attribute_targets(texts, judge.attributes)
    assert all((target >= 0).all() for target in targets.values())
    features = extract(judge, images.split(64))
    right = attributes_right(features.logits, {name: target[prompt] for name, target in targets.items()})
    assert all_right(right).mean() > 0.93
    blurred = F.avg_pool2d(images.float(), 3, stride=1, padding=1, count_include_pad=False).round().byte()
    other = extract(judge, real.images[3::6].split(64))
    spread = other.style.std(0)
    floor = frechet_distance(features.style / spread, other.style / spread)
    assert frechet_distance(extract(judge, blurred.split(64)).style / spread, other.style / spread) > 3 * floor
