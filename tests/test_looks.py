"""Measures of pictures without a model: exact cases, bands, and the sentences about what drifts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm.evaluation import drift, looks
from cdm.evaluation.drift import findings, growth, guidance_parameter, in_words
from cdm.evaluation.metrics import Chosen, compared_steps, measure_chosen
from cdm.evaluation.results import summary, write_results
from cdm.evaluation.samples import Samples
from cdm.measures import LOOKS, MEASURES, load, quantities
from cdm.models.manifest import TeacherManifest
from cdm.params import Params, Runtime, parse
from cdm.system.circumstances import Circumstances
from tests.sample_sets import PER_PROMPT, noise_pictures, open_sets, parameters, write_set

TEXTS = [f"prompt {number}" for number in range(9)]
COUNT = len(TEXTS) * PER_PROMPT
RUNTIME = Runtime(device="cpu")


def plain(colour: tuple[int, int, int], height: int = 5, width: int = 4) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(1, 3, height, width)


class TestValues:
    def test_saturation_is_that_of_hsv(self) -> None:
        pictures = torch.cat(
            [plain(each) for each in ((0, 0, 0), (90, 90, 90), (10, 0, 0), (200, 100, 150), (0, 128, 255))]
        )
        assert looks.saturation(pictures)[0].tolist() == pytest.approx([0, 0, 1, 0.5, 1])

    def test_contrast_is_the_deviation_of_the_luma(self) -> None:
        halves = torch.cat([plain((0, 0, 0), 4), plain((255, 255, 255), 4)], 3)
        assert looks.contrast(halves)[0].item() == pytest.approx(0.5)
        assert looks.contrast(plain((7, 99, 3)))[0].item() == pytest.approx(0, abs=looks.FLAT)
        picture = noise_pictures(3, 1, size=9)
        grey = (picture.double() / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
        assert looks.contrast(picture)[0].item() == pytest.approx(grey.std(correction=0).item(), rel=1e-6)

    @pytest.mark.parametrize(
        ("colour", "a", "b"),
        [
            ((255, 0, 0), 80.09, 67.20),
            ((0, 255, 0), -86.18, 83.18),
            ((0, 0, 255), 79.19, -107.86),
            ((128, 128, 128), 0, 0),
            ((0, 0, 0), 0, 0),
        ],
    )
    def test_the_cast_is_the_mean_colour_in_cielab(
        self, colour: tuple[int, int, int], a: float, b: float
    ) -> None:
        """Published values of the primaries of sRGB."""
        found = torch.stack(looks.colour_cast(plain(colour)))[:, 0]
        assert found.tolist() == pytest.approx([a, b], abs=0.01)
        half = torch.stack(looks.colour_cast(torch.cat([plain(colour), plain((60, 60, 60))], 2)))[:, 0]
        assert half.tolist() == pytest.approx([a / 2, b / 2], abs=0.01)

    def test_sharpness_falls_with_blur_and_not_with_contrast(self) -> None:
        picture = noise_pictures(4, 1, size=16)
        soft = torch.nn.functional.avg_pool2d(picture.float(), 3, 1, 1, count_include_pad=False)
        pale = (picture.float() / 4 + 90).round()
        sharp, blurred, faint = (
            looks.sharpness(each.to(torch.uint8))[0].item() for each in (picture, soft, pale)
        )
        assert blurred < 0.5 * sharp
        assert faint == pytest.approx(sharp, rel=0.01)
        assert looks.sharpness(plain((200, 3, 3)))[0].item() == 0
        assert looks.sharpness(noise_pictures(4, 2, size=2))[0].tolist() == [0, 0]

    def test_sharpness_by_hand(self) -> None:
        """One white pixel on black: its Laplacian is 4 there, and -1 at four neighbours."""
        picture = torch.zeros(1, 3, 7, 7, dtype=torch.uint8)
        picture[:, :, 3, 3] = 255
        laplacian = torch.zeros(5, 5)
        laplacian[2, 2] = 4
        laplacian[[1, 3, 2, 2], [2, 2, 1, 3]] = -1
        expected = laplacian.std(correction=0) / (1 / 49 * (1 - 1 / 49)) ** 0.5
        assert looks.sharpness(picture)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOOKS)
def test_bands_are_as_one_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few pixels are worked on at once, also of pictures that are wide or high."""
    compute = load(MEASURES[name].compute)
    pictures = noise_pictures(5, 4, size=24)[:, :, :17]
    whole = torch.stack(compute(pictures))
    assert whole.dtype == torch.float64
    assert whole.shape == (len(MEASURES[name].quantities), 4)
    assert len(set(whole[0].tolist())) == 4
    bands = looks._bands
    for pixels in (1, 4 * 24 * 5):
        heights: list[int] = []

        def recorded(images: Tensor, border: int, heights: list[int] = heights) -> Iterator[Tensor]:
            for band in bands(images, border):
                heights.append(band.shape[2])
                yield band

        monkeypatch.setattr(looks, "BAND", pixels)
        monkeypatch.setattr(looks, "_bands", recorded)
        assert torch.allclose(torch.stack(compute(pictures)), whole, rtol=1e-6, atol=1e-6)
        assert max(heights) <= max(1, pixels // (4 * 24)) + 2
        assert len(heights) > 1


def varied(seed: int, contrast: float = 1.0, red: float = 0.0) -> Tensor:
    """Pictures about grey, of the same noise for a seed but for their contrast and colour."""
    noise = noise_pictures(seed, COUNT, size=12).float() - 127.5
    own = 0.25 + 0.1 * torch.rand(COUNT, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    shift = torch.tensor([red, 0, 0])[:, None, None]
    return (127.5 + own * contrast * noise + shift).round().clamp(0, 255).to(torch.uint8)


def sets(folder: Path, **pictures: Tensor) -> Samples:
    """The student at 4 and 8 steps, and the teacher."""
    for key in ("student4", "student8", "teacher4", "teacher50"):
        model, steps = key[:7], int(key[7:])
        write_set(folder, model, steps, pictures.get(key, varied(1)))
    return open_sets(asked(), folder, TEXTS)


def asked(*metrics: str, resamples: int = 50) -> Params:
    values = parameters(judge=None, real=None).model_dump()
    values["evaluate"] |= {"metrics": list(metrics), "resamples": resamples}
    values["sample"] |= {"steps": [4, 8]}
    return parse(values)


def measured(params: Params, samples: Samples, folder: Path) -> Chosen:
    found = measure_chosen(params.evaluate, samples, None, folder, seed=0, runtime=RUNTIME)
    assert found is not None
    return found


def said(params: Params, samples: Samples, folder: Path) -> list[str]:
    found = findings(measured(params, samples, folder), samples, params.distill.losses)
    assert found is not None
    return found


def test_the_figures_are_means_over_pictures(tmp_path: Path) -> None:
    samples = sets(tmp_path, student4=varied(1, red=20))
    chosen = measured(asked(*LOOKS), samples, tmp_path)
    names = [quantity.key for name in LOOKS for quantity in MEASURES[name].quantities]
    assert names == ["saturation", "contrast", "cast_red", "cast_yellow", "sharpness"]
    pictures = torch.cat([*samples.student[0].batches()])
    row = chosen.figures["student"]["steps4"]
    expected = torch.stack([each for name in LOOKS for each in load(MEASURES[name].compute)(pictures)]).mean(1)
    assert [row[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-5)
    assert set(names) <= quantities().keys()
    difference = chosen.between["cast_red"][0]
    assert difference == pytest.approx(
        chosen.figures["student"]["steps8"]["cast_red"] - row["cast_red"], rel=1e-4
    )


def test_what_drifts_is_said_with_its_cause(tmp_path: Path) -> None:
    samples = sets(tmp_path, student4=varied(1, contrast=1.2), student8=varied(1, contrast=1.5))
    sentences = said(asked("contrast"), samples, tmp_path)
    assert len(sentences) == 2
    above, grown = sentences
    pattern = (
        r"Contrast is above the teacher's by 2[01] ± \S+ % at 4 steps and (49|50) ± \S+ % at 8 steps:"
        r" too much guidance \(distill\.losses\.ca\.scale\)\."
    )
    assert re.fullmatch(pattern, above)
    assert grown.startswith(("Contrast at 8 steps is 25 ± ", "Contrast at 8 steps is 24 ± "))
    assert grown.endswith(" % above that at 4 steps: every step is guided anew (distill.losses.ca.fade).")


def test_a_cast_is_said_by_its_colour(tmp_path: Path) -> None:
    samples = sets(tmp_path, student4=varied(1, red=-30), student8=varied(1, red=-30))
    sentences = said(asked("colour_cast"), samples, tmp_path)
    pattern = (
        r"The mean colour is more green than the teacher's by (\S+ ± \S+ of a\* at [48] steps( and )?){2}\."
    )
    assert [each for each in sentences if re.fullmatch(pattern, each)] == sentences[:1]
    assert not any("red" in each or "that at 4 steps" in each for each in sentences)


def test_nothing_is_said_of_what_chance_may_do(tmp_path: Path) -> None:
    """Other pictures of the same kind, and a difference that is certain but too small for anyone."""
    params = asked("contrast", "sharpness")
    samples = sets(tmp_path / "a", student4=varied(2), student8=varied(1, contrast=1.02))
    chosen = measured(params, samples, tmp_path)
    _, low, _ = chosen.differences["student"]["steps8"]["contrast"]
    assert low > 0
    found = findings(chosen, samples, params.distill.losses)
    assert found == []
    assert in_words(chosen, found) == ["No drift that the intervals bear out."]


def test_without_intervals_there_is_no_verdict(tmp_path: Path) -> None:
    params = asked("contrast", resamples=0)
    samples = sets(tmp_path, student4=varied(1, contrast=1.6))
    chosen = measured(params, samples, tmp_path)
    found = findings(chosen, samples, params.distill.losses)
    assert found == []
    assert in_words(chosen, found) == [
        "Of 9 prompts there are no intervals: whether pictures drift is not known."
    ]


def test_only_looks_drift(tmp_path: Path) -> None:
    params = asked("contrast")
    samples = sets(tmp_path)
    chosen = measured(params, samples, tmp_path)
    other = Chosen({"student": {"steps4": {"fid": 1.0}}, "teacher": {}}, {}, {}, {}, [], 9)
    assert findings(other, samples, params.distill.losses) is None
    assert findings(chosen, samples, params.distill.losses) is not None


@pytest.mark.parametrize(
    ("steps", "expected"), [([8, 1, 4, 2], (4, 8)), ([4, 8, 16], (4, 8)), ([1, 2, 4], (2, 4)), ([4], None)]
)
def test_the_steps_that_are_compared(steps: list[int], expected: tuple[int, int] | None) -> None:
    assert compared_steps(steps) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "distill.losses.ca.scale"),
        ({"ca": {"weight": 0.0}, "dm": {"guidance_scale": 3.0}}, "distill.losses.dm.guidance_scale"),
        ({"ca": {"weight": 0.0}}, "teacher.guidance_scale"),
    ],
)
def test_the_guidance_is_named_as_the_training_has_it(changes: dict[str, Any], expected: str) -> None:
    values = parameters().model_dump()
    for term, change in changes.items():
        values["distill"]["losses"][term] |= change
    assert guidance_parameter(parse(values).distill.losses) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "every step is guided anew (distill.losses.ca.fade)"),
        ({"ca": {"bounded": True}}, "CA alone is bounded (distill.losses.ca.bounded)"),
        (
            {name: {"bounded": True} for name in ("ca", "dm", "cdm")},
            "every step is guided anew (distill.losses.ca.fade)",
        ),
        ({"ca": {"weight": 0.0}}, ""),
    ],
)
def test_what_grows_with_the_steps_has_the_cause_that_the_training_has(
    changes: dict[str, Any], expected: str
) -> None:
    values = parameters().model_dump()
    for term, change in changes.items():
        values["distill"]["losses"][term] |= change
    assert growth(parse(values).distill.losses) == expected


def test_the_sentences_are_in_the_report_the_figures_and_on_the_terminal(tmp_path: Path) -> None:
    params = asked("contrast")
    sets(tmp_path / "samples", student4=varied(1, contrast=1.4))
    (tmp_path / "log.csv").write_text("iteration,loss_fake\n2,1.0\n4,0.5\n")
    results = write_results(
        params, TeacherManifest("sd3", "t", None, {}, [4, 1, 1], 1.0, 1), TEXTS, tmp_path / "samples",
        tmp_path / "log.csv", tmp_path / "quality.json", tmp_path, tmp_path, tmp_path,
        timing=tmp_path / "none.json", now=Circumstances("2026-03-01T12:30:59+01:00", "an abacus", "Python 3"),
    )  # fmt: skip
    assert results.said is not None
    assert len(results.said) == 2
    assert results.said[1].startswith("Contrast at 8 steps is 2")  # 1 / 1.4 - 1: 29 % below
    assert summary(results).splitlines()[-2:] == results.said
    page = (tmp_path / "index.html").read_text()
    shown = page[page.index("How the pictures look") :]
    assert "Contrast is above the teacher" in shown
    assert "8 steps less 4 steps" in page
    record = json.loads((tmp_path / "quality.json").read_text())["drift"]
    assert record["said"] == results.said
    assert (record["steps"]["few"], record["steps"]["more"]) == (4, 8)
    difference, low, high = record["steps"]["differences"]["contrast"]
    assert low < difference < high < 0


def test_a_record_without_two_numbers_of_steps() -> None:
    assert drift.as_record(Chosen({}, {}, {}, {}, [], 9), ["One."]) == {"said": ["One."]}
