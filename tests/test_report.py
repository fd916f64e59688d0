"""Sheets, curves and the report: what they show, that they need nothing else, and that they repeat byte by byte."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
import torch
from PIL import Image

from cdm.data.spread import spread
from cdm.errors import CdmError
from cdm.evaluation import plots, report, sheets
from cdm.evaluation.features import PixelFeatures
from cdm.evaluation.making import Making, Training, read_training
from cdm.evaluation.quality import Evaluation
from cdm.evaluation.report import Picture, Pictures
from cdm.evaluation.results import student_code, summary, write_results
from cdm.evaluation.samples import RealPictures, Samples, SampleSet
from cdm.evaluation.theme import DARK
from cdm.measures import JUDGED, is_quality
from cdm.models.manifest import TeacherManifest
from cdm.params import Lora
from cdm.system.circumstances import Circumstances
from tests import chromium
from tests.sample_sets import (
    PER_PROMPT,
    TEXTS,
    evaluated,
    noise_pictures,
    open_sets,
    parameters,
    write_real,
    write_sets,
)

LOG = "iteration,loss_fake,loss_dm,lr_student,custom\n1,0.5,,,7\n2,0.25,0.125,1e-4,8\n3,0.25,,,9\n4,0.2,0.1,0.0,10\n"
PARAMS = parameters(judge=None)
FRECHET = JUDGED["frechet_distance"]
TEACHER = TeacherManifest("sd3", "org/<b>model</b>", "0123abc", {}, [4, 1, 1], 1.0, 2_030_000)
NOW = Circumstances(
    "2026-03-01T12:30:59+01:00",
    "an abacus, 2 cores",
    "Python 3",
    "0123456789abcdef",
    ["a.py", "b.py", "c.py", "d.py"],
)
MADE = Making(
    NOW,
    Training(replace(NOW, date="2026-03-01T09:00:00+00:00", changed=[]), 3725.4),
    {"student": "cd" * 32, "samples": "ef" * 32},
)
CODE = 'print("a > b & c")'
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return open_sets(PARAMS, write_sets(tmp_path_factory.mktemp("sets")), TEXTS)


@pytest.fixture(scope="module")
def evaluation(samples: Samples) -> Evaluation:
    real = RealPictures(noise_pictures(50, 30), torch.arange(30) % 3)
    return evaluated(PARAMS, samples, real, PixelFeatures())


@pytest.fixture(scope="module")
def page(samples: Samples, evaluation: Evaluation) -> str:
    picture = Picture(PNG + b"light", PNG + b"dark")
    pictures = Pictures(picture, [picture] * 3, [picture] * 2, sheets.strips(samples, 2))
    return report.render(PARAMS, TEACHER, samples, evaluation, pictures, MADE, code=CODE)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def contains(sheet: np.ndarray, picture: torch.Tensor, factor: int) -> list[tuple[int, int]]:
    """Places (row, column) at which a picture stands on the sheet, each of its pixels a square of `factor`."""
    wanted = picture.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
    height, width, _ = wanted.shape
    corners = np.argwhere((sheet[: -height or None, : -width or None] == wanted[0, 0]).all(-1))
    return [(y, x) for y, x in corners if np.array_equal(sheet[y : y + height, x : x + width], wanted)]


def test_the_overview_shows_the_same_noise_in_every_column(samples: Samples) -> None:
    """Teacher at 50 and 4 steps, then the student at 1 and 4; the first noise of each prompt, enlarged 16 times."""
    sheet = pixels(sheets.overview(samples))
    student1, student4 = samples.student
    teacher4, teacher50 = samples.teacher
    places = [
        [contains(sheet, each.pictures([prompt * PER_PROMPT])[0], 16) for prompt in range(3)]
        for each in (teacher50, teacher4, student1, student4)
    ]
    assert all(len(found) == 1 for column in places for found in column)
    rows = [[found[0][0] for found in column] for column in places]
    columns = [[found[0][1] for found in column] for column in places]
    assert rows[0] == rows[1] == rows[2] == rows[3] == sorted(rows[0])
    assert all(len(set(column)) == 1 for column in columns)
    assert [column[0] for column in columns] == sorted(column[0] for column in columns)


def test_the_contact_sheet_shows_four_noises_of_the_prompts(samples: Samples) -> None:
    sheet = pixels(sheets.contact_sheet(samples, prompts=2))
    shown = spread(3, 2)
    for each in samples.sets:
        for index in range(3 * PER_PROMPT):
            picture = each.pictures([index])[0]
            assert len(contains(sheet, picture, 12)) == (index // PER_PROMPT in shown), (each.key, index)


def test_strips_hold_the_pixels_of_every_set_without_letters(samples: Samples) -> None:
    strips = sheets.strips(samples, 2)
    chosen = spread(3, 2)
    assert strips.prompts == [TEXTS[prompt] for prompt in chosen]
    assert (strips.noises, strips.across, strips.small) == (4, 2, True)
    for each, file in zip(samples.sets, strips.files, strict=True):
        strip = pixels(file)
        assert strip.shape == (2 * 2 * 8, 2 * 8, 3)
        for row, prompt in enumerate(chosen):
            for noise in range(4):
                y, x = 16 * row + 8 * (noise // 2), 8 * (noise % 2)
                expected = each.pictures([prompt * PER_PROMPT + noise])[0].permute(1, 2, 0).numpy()
                assert np.array_equal(strip[y : y + 8, x : x + 8], expected)


def test_strips_of_large_pictures_are_small_files(tmp_path: Path) -> None:
    smooth = torch.linspace(0, 255, 300).to(torch.uint8).expand(12, 3, 300, 300)
    sets = {
        f"{model}{steps}": smooth
        for model, steps in (("student", 1), ("student", 4), ("teacher", 4), ("teacher", 50))
    }
    strips = sheets.strips(open_sets(PARAMS, write_sets(tmp_path, **sets), TEXTS), 3)
    assert (strips.noises, strips.across, strips.small) == (1, 1, False)
    for file in strips.files:
        assert file.startswith(b"RIFF")
        assert pixels(file).shape == (3 * 256, 256, 3)
        assert len(file) < 10_000


def test_pictures_are_read_one_at_a_time(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sheet of large pictures would hold those of all its columns."""
    real, read = SampleSet.pictures, []

    def pictures(self: SampleSet, indices: list[int]) -> torch.Tensor:
        read.append(len(indices))
        return real(self, indices)

    monkeypatch.setattr(SampleSet, "pictures", pictures)
    sheets.contact_sheet(samples, 2)
    sheets.strips(samples, 2)
    assert set(read) == {1}
    assert len(read) >= 2 * 2 * 4 * len(samples.sets)


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    big = {
        f"{model}{steps}": noise_pictures(0, 12, size=300) for model, steps in (("student", 1), ("teacher", 50))
    }
    big |= {"student4": big["student1"], "teacher4": big["student1"]}
    height, width, _ = pixels(sheets.overview(open_sets(PARAMS, write_sets(tmp_path, **big), TEXTS))).shape
    assert (width, height) == (24 + 138 + 8 + 2 * (2 * 128 + 8) + 32 + 24, 24 + 84 + 3 * 136 - 8 + 24)


@pytest.mark.parametrize(("total", "count"), [(64, 8), (64, 6), (100, 7), (9, 9), (5, 8)])
def test_spread_takes_one_of_each_part(total: int, count: int) -> None:
    chosen = spread(total, count)
    assert len(chosen) == min(total, count)
    parts = [index * len(chosen) // total for index in chosen]
    assert parts == list(range(len(chosen)))


def test_long_prompts_are_cut(samples: Samples) -> None:
    long = replace(samples, texts=["word " * 400] * 3)
    assert pixels(sheets.overview(long)).shape == pixels(sheets.overview(samples)).shape


def test_pictures_and_plots_repeat_and_hold_no_metadata(
    samples: Samples, evaluation: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    curves = plots.read_log(tmp_path / "log.csv")
    for draw in (
        lambda theme: sheets.overview(samples, theme=theme),
        lambda theme: plots.quality(evaluation, theme),
        lambda theme: plots.losses(curves, theme),
    ):
        dark = draw(DARK)
        assert dark == draw(DARK)
        assert Image.open(io.BytesIO(dark)).info.keys() <= {"dpi"}
        assert tuple(pixels(dark)[0, 0, :3]) == tuple(bytes.fromhex(DARK.ground[1:]))


def test_the_log_leaves_out_blank_cells(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    curves = plots.read_log(tmp_path / "log.csv")
    assert curves["loss_fake"] == [(1, 0.5), (2, 0.25), (3, 0.25), (4, 0.2)]
    assert curves["loss_dm"] == [(2, 0.125), (4, 0.1)]
    assert curves["custom"] == [(1, 7), (2, 8), (3, 9), (4, 10)]


@pytest.mark.parametrize("text", ["", "iteration,loss\n", "step,loss\n1,2\n", "iteration,loss\n1,high\n"])
def test_what_is_no_log_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(CdmError, match=r"log\.csv: not a training log"):
        plots.read_log(tmp_path / "log.csv")
    with pytest.raises(CdmError, match=r"none\.csv: cannot be read"):
        plots.read_log(tmp_path / "none.csv")


def test_the_moving_average_is_unbiased_and_forgets() -> None:
    assert plots.moving_average([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert plots.moving_average([1.0, 5.0, 2.0], 1) == [1.0, 5.0, 2.0]
    assert plots.moving_average([0.0, 1.0], 2) == pytest.approx([0, 1 / 1.5])
    assert plots.moving_average([0.0] * 50 + [1.0] * 50, 5)[-1] == pytest.approx(1, abs=1e-4)


class Outline(HTMLParser):
    """Checks that tags are balanced; keeps the attributes of all, and the text of table rows."""

    VOID = frozenset({"meta", "img", "source", "br", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_report_needs_nothing_from_elsewhere(page: str, samples: Samples) -> None:
    outline = Outline(page)
    links = [
        value for _, name, value in outline.attributes if name in ("src", "srcset", "href", "action", "data")
    ]
    assert len(links) == 2 * (1 + 3 + 2) + len(samples.sets)
    assert all(value.startswith("data:image/png;base64,") for value in links)
    assert not {tag for tag, _, _ in outline.attributes} & {"link", "iframe"}
    assert [attribute for attribute in outline.attributes if attribute[0] == "script"] == []
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_report_escapes_names(page: str) -> None:
    assert "<b>model" not in page
    assert "org/&lt;b&gt;model&lt;/b&gt;" in page


def test_the_report_wipes_sets_that_it_shows(page: str, samples: Samples) -> None:
    outline = Outline(page)
    options = [value for tag, name, value in outline.attributes if (tag, name) == ("option", "value")]
    shown = {value for tag, name, value in outline.attributes if (tag, name) == ("img", "id")}
    assert sorted(options) == sorted(shown) == sorted(f"{each.model}-{each.key}" for each in samples.sets)
    assert '<option value="teacher-steps50" selected>' in page
    assert '<option value="student-steps4" selected>' in page


def test_the_report_shows_code_and_a_command_to_copy(
    page: str, samples: Samples, evaluation: Evaluation
) -> None:
    blocks = [html.unescape(block) for block in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    assert blocks == [CODE, f"cdm sample '{TEXTS[0]}' --steps 4 --seed 0 --out picture.png"]
    pictures = Pictures(Picture(PNG, PNG), [], [], sheets.strips(samples, 1))
    without = report.render(PARAMS, TEACHER, samples, evaluation, pictures, MADE)
    assert len(re.findall("<pre>", without)) == 1


def test_the_reports_code_is_that_of_the_student(tiny_sd3: Path, tiny_teacher: TeacherManifest) -> None:
    """tests/test_export.py runs what `diffusers_code` writes."""
    code = student_code(PARAMS, tiny_teacher, 'a "red" three')
    assert code is not None
    compile(code, "code", "exec")
    assert 'StableDiffusion3Pipeline.from_pretrained(\n    "models/student",' in code
    assert '"a \\"red\\" three",' in code
    adapted = PARAMS.model_copy(
        update={"distill": PARAMS.distill.model_copy(update={"lora": Lora(rank=2, alpha=2)})}
    )
    by_lora = student_code(adapted, tiny_teacher, "a")
    assert by_lora is not None
    assert f'from_pretrained(\n    "{tiny_sd3}",' in by_lora
    assert 'load_lora_weights("models/student"' in by_lora
    assert student_code(PARAMS, replace(tiny_teacher, source="no/such"), "a") is None


def test_the_report_says_when_where_and_at_which_commit(page: str) -> None:
    line = "Trained 2026-03-01 09:00 UTC in 1 h 2 min, evaluated 2026-03-01 11:30 UTC"
    files = ", ".join(f"<code>{name}.py</code>" for name in "abc")
    assert f"{line}, commit <code>012345678</code> with changes in {files}, 1 more." in page
    rows = {row[0]: row[1] for row in Outline(page).rows if len(row) == 2}
    assert rows["Training"] == "begun 2026-03-01 09:00 UTC, took 1 h 2 min"
    assert (
        rows["Machine of the training"] == rows["Machine of the evaluation"] == "an abacus, 2 cores; Python 3"
    )
    assert rows["Code of the training"] == "commit 0123456789abcdef"
    assert rows["Student, SHA-256"] == "cd" * 32


def test_the_report_has_no_raw_backticks(page: str) -> None:
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "`" not in outside
    assert "<code>org/name</code>" in outside, "of a meaning in cdm/params.py"


def test_a_training_leaves_its_time_and_circumstances(tmp_path: Path) -> None:
    timing = tmp_path / "timing.json"
    assert read_training(timing) is None, "there is none"
    timing.write_text(json.dumps({"rounds": 800, "seconds": 61.2, "circumstances": NOW.as_dict()}))
    assert read_training(timing) == Training(NOW, 61.2)
    for damaged in (
        "",
        "[]",
        '{"rounds": 800, "seconds": 1124.3}',
        '{"seconds": 1, "circumstances": {"a": 1}}',
    ):
        timing.write_text(damaged)
        assert read_training(timing) is None


def test_a_model_and_a_term_keep_their_colour_in_all_panels() -> None:
    theme = DARK
    names = [
        "loss_fake",
        "loss_ca",
        "loss_dm",
        "loss_cdm",
        "grad_norm_student",
        "grad_norm_fake",
        "probe",
        "x0_distance",
    ]
    together = plots.colours(names, theme)
    for name in names:
        assert plots.colours([name], theme) == {name: together[name]}
    assert together["grad_norm_student"] == together["probe"] == theme.student
    assert together["loss_fake"] == together["grad_norm_fake"] == theme.fake
    assert together["x0_distance"] == theme.teacher
    assert len({together[f"loss_{term}"] for term in ("ca", "dm", "cdm")} | {theme.student, theme.teacher}) == 5
    probes = [f"probe_steps{steps}" for steps in (1, 2, 4, 8)]
    assert len(set(plots.colours([*probes, "probe"], theme).values())) == 5


def test_the_report_says_what_was_measured_and_how(page: str, samples: Samples, evaluation: Evaluation) -> None:
    rows = {row[0]: row[1:] for row in Outline(page).rows}
    assert rows["Seed"] == [str(PARAMS.seed)]
    assert rows["Prompts, SHA-256"] == [samples.prompts_sha256]
    assert "12 a row: 3 prompts, 4 each" in rows["Samples"][0]
    assert "30 real pictures" in rows["Reference"][0]
    assert rows["Features"] == [PixelFeatures.description]
    assert rows["distill.losses.ca.scale"][0] == str(PARAMS.distill.losses.ca.scale)
    assert rows["latents.per_prompt"][0] == "4"
    assert not any(name.startswith("runtime") for name in rows)


def test_the_table_holds_the_figures(page: str, evaluation: Evaluation) -> None:
    rows = {row[0]: row[1:] for row in reversed(Outline(page).rows)}  # the first table of a name wins
    figures = evaluation.quality["student"]["steps4"]
    reach = evaluation.reaches["student"]["steps4"]["frechet_distance"]
    shown = rows["Student, 4 steps"]
    assert shown[0] == "4"
    size = figures["frechet_distance"]
    assert shown[1] == f"{report.number(size, FRECHET)} ± {report.number(reach, FRECHET, like=size)}"
    assert rows["Real pictures"][1] == report.number(evaluation.floor["frechet_distance"], FRECHET)
    heads = [title.split("\u00a0")[0] for title in rows[""]]
    assert heads == [
        "Evaluations", "Distance of pixel statistics", "Distance of pixel detail",
        "Precision, pixels", "Recall, pixels", "Diversity, pixels",
    ]  # fmt: skip
    assert not re.search("Fréchet distance[^s]*↓", page)


def test_marks_of_best_and_near(evaluation: Evaluation) -> None:
    values = {
        ("student", "steps1"): 1.0,
        ("student", "steps4"): 1.2,
        ("teacher", "steps4"): 1.4,
        ("teacher", "steps50"): 1.0,
    }
    errors = {"student": {"steps1": 0.06, "steps4": 0.06}, "teacher": {"steps4": 0.06, "steps50": 0.06}}
    measured = replace(
        evaluation,
        errors={m: {k: {"frechet_distance": e} for k, e in rows.items()} for m, rows in errors.items()},
    )
    figures = {place: {"frechet_distance": value} for place, value in values.items()}
    expected = {("student", "steps1"): "best", ("teacher", "steps50"): "best", ("student", "steps4"): "near"}
    assert report.marks(FRECHET, figures, measured) == expected  # 1.4 is further than sqrt(2) * 3.18 * 0.06
    higher = replace(FRECHET, better="high")
    assert report.marks(higher, figures, measured) == {
        ("teacher", "steps4"): "best",
        ("student", "steps4"): "near",
    }
    assert report.marks(replace(FRECHET, better=None), figures, measured) == {}


def test_numbers_keep_three_digits() -> None:
    assert [report.number(v, FRECHET) for v in (0.0123, 9.876, 12.3456, 271.19, 1234.5, -0.002)] == [
        "0.012", "9.876", "12.35", "271.2", "1234", "\u22120.002",
    ]  # fmt: skip
    assert report.number(0.906, JUDGED["attribute_accuracy"]) == "90.6 %"
    assert report.number(0.123456, FRECHET, like=87.0) == "0.12"


def test_everything_is_written_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files that the stages leave, with the teacher as reference and no judge.

    A plain picture stands for each plot: that plots repeat is asked above.
    """
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "png")
    monkeypatch.setattr(plots, "as_png", lambda figure: plain.getvalue())
    params = parameters(judge=None, real=None)
    write_sets(tmp_path / "samples")
    (tmp_path / "log.csv").write_text(LOG)
    outputs = []
    for run in ("a", "b"):
        out = tmp_path / run
        results = write_results(
            params, TEACHER, TEXTS, tmp_path / "samples", tmp_path / "log.csv",
            out / "metrics/quality.json", out / "plots", out / "report", tmp_path / "answers",
            timing=tmp_path / "none.json", now=NOW,
        )  # fmt: skip
        outputs.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")})
    names = {f"plots/{name}.png" for name in ("overview", "contact_sheet", "quality", "losses")}
    assert outputs[0].keys() == names | {"metrics/quality.json", "report/index.html"}
    assert outputs[0] == outputs[1]
    figures = json.loads(outputs[0]["metrics/quality.json"])
    assert figures["basis"] == {
        "student": "cd" * 32, "teacher": "cd" * 32, "samples": figures["basis"]["samples"],
        "guidance_scale": 2.0, "prompts": "ab" * 32, "seed": 0,
        "per_prompt": 4, "judge": None, "real": None, "models": {},
    }  # fmt: skip
    replicates = figures["replicates"]["noise"]["student"]["steps4"]["style_distance"]
    assert len(replicates) == 4
    error = results.evaluation.errors["student"]["steps4"]["style_distance"]
    assert stdev(replicates) == pytest.approx(error, rel=1e-3)
    assert not {"Fréchet", "Style"} & set(summary(results).split())
    assert "Distance of pixel statistics  Distance of pixel detail" in summary(results).splitlines()[0]
    assert [line.split()[0] for line in summary(results).splitlines()[1:]] == ["Student,"] * 2 + [
        "Teacher,"
    ] * 2


def test_measures_that_are_left_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = parameters(judge=None, real=None, metrics=["frechet_inception"], missing="skip")
    write_sets(tmp_path / "samples")
    (tmp_path / "log.csv").write_text(LOG)
    write_results(
        params, TEACHER, TEXTS, tmp_path / "samples", tmp_path / "log.csv",
        tmp_path / "quality.json", tmp_path / "plots", tmp_path / "report", tmp_path / "answers",
        timing=tmp_path / "none.json", now=NOW,
    )  # fmt: skip
    problem = "evaluate.models.inception: weights-inception-2015-12-05-6726825d.pth: no such file or folder"
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["skipped"] == {"frechet_inception": problem}
    assert is_quality(quality)
    page = (tmp_path / "report/index.html").read_text()
    Outline(page)
    assert "<h2>Measures left out</h2>" in page
    assert f"<li><b>frechet_inception</b>: {problem}.</li>" in page


def test_inputs_are_read_before_anything_is_written(tmp_path: Path) -> None:
    write_sets(tmp_path / "samples")
    (tmp_path / "log.csv").write_text(LOG)
    write_real(tmp_path / "real.safetensors", noise_pictures(0, 2), TEXTS[:2])
    params = parameters(judge=None, real=str(tmp_path / "real.safetensors"))
    for log, message in (("none.csv", "none.csv"), ("log.csv", "no picture of 1 of the 3")):
        with pytest.raises(CdmError, match=message):
            write_results(
                params, TEACHER, TEXTS, tmp_path / "samples", tmp_path / log,
                tmp_path / "out/quality.json", tmp_path / "out", tmp_path / "out", tmp_path / "out",
                timing=tmp_path / "none.json", now=NOW,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_report_works_in_a_browser(tmp_path: Path) -> None:
    """By mouse and keyboard, on a wide screen and on one of 400 pixels, without a network."""
    write_sets(tmp_path / "samples")
    (tmp_path / "log.csv").write_text(LOG)
    write_results(
        parameters(judge=None, real=None), TEACHER, TEXTS, tmp_path / "samples", tmp_path / "log.csv",
        tmp_path / "quality.json", tmp_path, tmp_path, tmp_path, timing=tmp_path / "none.json", now=NOW,
    )  # fmt: skip
    with chromium.Browser(1280, 900) as browser:
        address = (tmp_path / "index.html").as_uri()
        browser.open(address)
        browser.wait("!document.getElementById('compare').hidden")

        browser.run("document.querySelector('button.enlarge').focus()")
        browser.press("Enter")
        assert browser.run("document.getElementById('enlarged').open")
        shown = "document.querySelector('#enlarged img')"
        browser.wait(f"{shown}.complete && {shown}.naturalWidth > 0")
        assert browser.run(f"{shown}.getBoundingClientRect().width") >= browser.run(f"{shown}.naturalWidth")
        browser.press("Escape")
        assert not browser.run("document.getElementById('enlarged').open")
        assert browser.run("document.activeElement.className") == "enlarge", "the focus is back where it was"
        browser.run("document.querySelector('.sets button.enlarge').click()")
        assert browser.run(f"{shown}.className") == "pixels"
        assert browser.run(f"getComputedStyle({shown}).imageRendering") == "pixelated"
        browser.run("document.querySelector('#enlarged button').click()")
        assert not browser.run("document.getElementById('enlarged').open")

        # A block has two pictures side by side: a drag is within the one that it began in.
        browser.drag(".wipe", 0.1, 0.125)
        assert 20 <= float(browser.run("document.getElementById('at').value")) <= 30
        browser.run("document.getElementById('at').focus()")
        before = float(browser.run("document.getElementById('at').value"))
        browser.press("ArrowRight")
        assert float(browser.run("document.getElementById('at').value")) == before + 1
        assert (
            browser.run("document.getElementById('wipes').style.getPropertyValue('--at')") == f"{before + 1:g}%"
        )
        over = "document.querySelector('.wipe .over img').src"
        assert browser.run(f"{over} === document.getElementById('student-steps4').src")
        browser.run(
            "const choice = document.getElementById('over');"
            "choice.value = 'student-steps1'; choice.dispatchEvent(new Event('change'))"
        )
        assert browser.run(f"{over} === document.getElementById('student-steps1').src")

        browser.run("document.querySelector('.snippet button').click()")
        browser.wait("document.querySelector('.snippet button').textContent !== 'Copy'")
        if browser.run("document.querySelector('.snippet button').textContent") == "Selected":
            assert browser.run("getSelection().toString()").startswith("cdm sample ")

        browser.resize(400, 900)
        assert browser.run("document.documentElement.scrollWidth") <= 400, "nothing sticks out"
        cells = "[...document.querySelectorAll('table.text td')]"
        narrow = f"{cells}.filter((cell) => cell.offsetHeight > 5 * cell.offsetWidth)"
        assert browser.run(f"{narrow}.map((cell) => cell.textContent)") == [], "no text runs down the page"
        assert all(url.startswith((address, "data:")) for url in browser.requested)
