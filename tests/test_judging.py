"""The judging: its params file, what is drawn and measured, tables, the verdict, and its pipeline through DVC."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from cdm.cli import app
from cdm.data.store import Store
from cdm.errors import CdmError
from cdm.evaluation.metrics import measure_chosen
from cdm.evaluation.samples import Samples, SampleSet
from cdm.judging import models, run, tables
from cdm.judging.arguments import judging_of, parse_model
from cdm.judging.cells import Drawing, check, resolve
from cdm.judging.design import Judging, load_judging
from cdm.judging.drawing import draw_cell
from cdm.judging.measuring import Result
from cdm.judging.page import render
from cdm.judging.places import Places
from cdm.judging.standing import Standing
from cdm.measures import quantities
from cdm.params import ParamsError, Runtime, validated
from cdm.randomness import sample_noise
from cdm.system.files import Memory
from tests import tiny_pipelines
from tests.metric_models import write_aesthetic, write_clip, write_inception
from tests.repository import ROOT, Repository, make_repository

TEXTS = [f"a {ink} {digit} on {paper} paper" for ink in ("red", "blue") for digit in ("two", "six")
         for paper in ("black", "white")]  # fmt: skip
RUNTIME = {"device": "cpu", "batch_size": 3}


def values(folder: Path, sources: dict[str, Path], clip: Path) -> dict[str, Any]:
    """A judging of tiny models on two prompt sets: one that is scored, one that a judge sees."""
    return {
        "rows": list(sources),
        "sets": ["scored", "judged"],
        "reference": next(iter(sources)),
        "precision": "fp32",
        "models": {
            name: {"title": f"Model {name}", "source": str(source), "steps": 2, "resolution": 32}
            for name, source in sources.items()
        },
        "prompts": {
            "scored": {"title": "Scored", "files": [str(folder / "prompts.txt")], "metrics": ["clip_score"]},
            "judged": {
                "title": "Judged",
                "files": [str(folder / "prompts.txt")],
                "count": 2,
                "per_prompt": 4,
                "judge": str(ROOT / "miniature/judge"),
            },
        },
        "metric_models": {"clip": str(clip)},
        "runtime": RUNTIME,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("judging")
    (made / "prompts.txt").write_text("\n".join(TEXTS))
    write_clip(made / "clip")
    return made


@pytest.fixture(scope="module")
def two(folder: Path, tiny_pipeline: Callable[[str], Path]) -> dict[str, Any]:
    """Two models of two families."""
    found = {"base": tiny_pipeline("sd3"), "other": tiny_pipeline("longcat")}
    made = values(folder, found, folder / "clip")
    made["models"]["base"] |= {"guidance_scale": 3.0}
    made["models"]["other"] |= {"max_sequence_length": tiny_pipelines.TEXT_TOKENS["longcat"]}
    return made


@pytest.fixture(scope="module")
def judged(folder: Path, two: dict[str, Any]) -> tuple[Judging, Places]:
    """Both models judged, in a folder."""
    judging = validated(Judging, two)
    run.judge(judging, folder / "judged")
    return judging, Places(folder / "judged")


@pytest.fixture
def standing(judged: tuple[Judging, Places]) -> Standing:
    return Standing.read(*judged)


# The params file.


def changed(values: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    """A copy in which the value at the dotted `keys` is another."""
    copy = json.loads(json.dumps(values))
    *parents, last = keys.split(".")
    place = copy
    for key in parents:
        place = place[key]
    place[last] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rows", ["base", "base"], "rows names something twice: base, base"),
        ("rows", ["base", "third"], "rows: third is not defined: add it to models"),
        ("sets", ["scored", "coco"], "sets: coco is not defined: add it to prompts"),
        ("sets", ["two-words"], "sets.0: string should match pattern"),
        ("reference", "third", "reference third is not in rows: add it"),
        ("models.other.steps", 0, "models.other.steps: input should be greater than or equal to 1, not 0"),
        ("models.other.steps", 10**9, "models.other.steps: input should be less than or equal to"),
        ("models.other.sigmas", [1.0, 0.5, 0.25], "models.other: steps is 2, but sigmas has 3 levels"),
        ("models.other.sigmas", [0.9, 0.5], "models.other: sigmas must fall from 1.0"),
        ("models.other.guidance_scale", 0.5, "models.other.guidance_scale: input should be greater"),
        ("models.other.stepz", 2, "models.other.stepz: unknown key"),
        ("models.other.source", None, "models.other: has neither a source nor published figures"),
        (
            "models.other.published",
            {"coco": {"hps": 1}},
            "models.other.published: no prompt set is called coco",
        ),
        ("models.other.published", {"scored": {"hps": True}}, "expected a number, not true"),
        ("prompts.scored.metrics", ["beauty"], "prompts.scored: metrics: unknown measure 'beauty'"),
        ("prompts.scored.metrics", [], "prompts.scored: names no measure"),
        (
            "prompts.scored.metrics",
            ["lpips"],
            "prompts.scored: metrics has lpips, which compares pictures of one",
        ),
        ("prompts.scored.per_prompt", 0, "prompts.scored.per_prompt: input should be greater"),
        (
            "prompts.scored.scorers",
            ["hpsv3"],
            "prompts.scored.scorers: hpsv3 is not defined: add it to scorers",
        ),
        (
            "scorers",
            [{"name": "hps", "command": "true"}],
            "scorers: a name is used twice, or is a measure's: hps",
        ),
        ("agreement", {"models": ["base"], "tolerance": {"hps": 1}}, "agreement.models: base has no published"),
        (
            "agreement",
            {"models": ["base"], "tolerance": {"hps": 0}},
            "agreement.tolerance.hps: input should be",
        ),
        ("precision", "fp8", "precision: input should be 'fp32', 'bf16' or 'fp16', not 'fp8'"),
        ("seed", -1, "seed: input should be greater than or equal to 0, not -1"),
        ("tables", {}, "tables: unknown key (known here: seed, rows, sets"),
    ],
)
def test_a_params_file_that_cannot_be_used_is_a_line(
    two: dict[str, Any], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(changed(two, key, value)))
    with pytest.raises(ParamsError, match=re.escape(says)) as caught:
        load_judging(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_source_is_in_no_row(two: dict[str, Any]) -> None:
    known = changed(two, "models.other", {"title": "Published", "published": {"scored": {"clip_score": 1.0}}})
    with pytest.raises(ParamsError, match="rows: other has no source, so it cannot draw"):
        validated(Judging, known)
    assert validated(Judging, known | {"rows": ["base"]}).rows == ["base"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "models.other.source",
            "nowhere",
            "models.other.source: nowhere: no such folder or file, and not a hub id",
        ),
        ("prompts.scored.files", ["none.txt"], "prompts.scored.files: none.txt: no such file"),
        ("prompts.judged.count", 99, "prompts.judged.files: they hold 8 prompts, but count is 99"),
        ("prompts.judged.judge", "none", "prompts.judged.judge: none: no such folder"),
        ("prompts.judged.neighbours", 9, "prompts.judged.neighbours 9 is too many for 8 samples of 2 prompts"),
        (
            "metric_models.clip",
            "none",
            "metric_models.clip: none: no such file or folder, but prompts.scored.metrics",
        ),
    ],
)
def test_what_is_named_and_not_there_is_a_line_before_anything(
    two: dict[str, Any], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    with pytest.raises(CdmError, match=f"^{re.escape(says)}"):
        check(validated(Judging, changed(two, key, value)), Places(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("models.base.resolution", 33, r"^models\.base: resolution is 33, but this model draws multiples of"),
        (
            "models.other.max_sequence_length",
            8000,
            r"^models\.other: max_sequence_length is 8000: this model takes",
        ),
        ("models.other.revision", "main", r"^models\.other: revision is 'main', but .* is here and has none"),
    ],
)
def test_what_a_model_cannot_do_is_a_line_of_the_first_step(
    two: dict[str, Any], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    with pytest.raises(CdmError, match=says):
        resolve(validated(Judging, changed(two, key, value)), Places(tmp_path), Memory())
    assert list(tmp_path.iterdir()) == []


def test_a_broken_model_of_a_measure_is_said_before_anything_is_drawn(
    two: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(two["metric_models"]["clip"], tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CdmError, match=r"clip"):
        resolve(
            validated(Judging, changed(two, "metric_models.clip", str(tmp_path / "clip"))),
            Places(tmp_path / "out"),
            Memory(),
        )
    assert not (tmp_path / "out/samples").exists()


def test_a_damaged_model_is_named_by_the_first_step(
    two: dict[str, Any], tiny_sd3: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model_index.json").write_text((tiny_sd3 / "model_index.json").read_text())
    judging = validated(Judging, changed(two, "models.other.source", str(tmp_path / "broken")))
    with pytest.raises(CdmError, match=r"^models\.other: .*broken"):
        resolve(judging, Places(tmp_path / "out"), Memory())


@pytest.mark.parametrize("path", sorted(ROOT.glob("judging/*.yaml")), ids=lambda path: path.name)
def test_the_files_of_the_repository_are_judgings(path: Path) -> None:
    if path.name == "dvc.yaml":
        return
    judging = load_judging(path)
    keys = {*quantities(), *(scorer.name for scorer in judging.scorers)}
    for model in judging.models.values():
        assert all(figures.keys() <= keys for figures in model.published.values())
    if judging.agreement is not None:
        known = [judging.models[row].published for row in judging.agreement.models]
        published = {key for each in known for figures in each.values() for key in figures}
        assert judging.agreement.tolerance.keys() <= published


def test_the_pipeline_keeps_its_files_where_the_library_puts_them() -> None:
    stages = YAML(typ="safe").load(ROOT / "judging/dvc.yaml")["stages"]
    places = Places(Path())
    row, name = "${item.model}", "${item.set}"
    assert stages["draw"]["deps"] == [str(places.drawing(row, name))]
    assert stages["draw"]["outs"] == [str(places.pictures(row, name)), str(places.samples(row, name))]
    assert stages["measure"]["deps"] == [
        str(places.measuring(name)),
        str(places.samples(row, name)),
        str(places.samples("${reference}", name) / "manifest.json"),
    ]
    assert list(stages["measure"]["outs"][0]) == [str(places.result(row, name))]


# Drawing.


@pytest.mark.parametrize(("row", "name", "scale"), [("base", "sd3", 3.0), ("other", "longcat", 1.0)])
def test_pictures_are_what_diffusers_draws_from_the_same_noise(
    judged: tuple[Judging, Places], tiny_pipeline: Callable[[str], Path], row: str, name: str, scale: float
) -> None:
    judging, places = judged
    store = Store(places.samples(row, "judged"))
    drawing = Drawing.read(places.drawing(row, "judged"))
    assert len(store) == 8
    assert (drawing.steps, drawing.evaluations) == (2, 4 if scale > 1 else 2)
    pipeline = models.find(judging.models[row]).load()
    prompts = [TEXTS[0]] * 4 + [TEXTS[1]] * 4
    noise = sample_noise(0, range(8), drawing.latent_shape)
    drawn = tiny_pipelines.call(name, pipeline, prompts, noise, [1.0, 0.5], scale, output_type="pt")
    expected = (drawn * 255).round().to(torch.uint8)
    difference = (store.all()["images"].int() - expected.int()).abs()
    assert difference.max() <= 1, "a rounding at most"


def test_an_interrupted_cell_is_taken_up_at_its_last_whole_shard(
    judged: tuple[Judging, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging, places = judged
    drawing = Drawing.read(places.drawing("base", "scored"))
    model, runtime = models.find(judging.models["base"]), Runtime(device="cpu", batch_size=2)
    monkeypatch.setattr("cdm.judging.drawing.shard_rows", lambda _: 4)
    batches: list[range] = []
    original = drawn = type(model.family).sample

    def sample(self: Any, pipeline: Any, noise: Any, *arguments: Any) -> Any:
        batches.append(range(len(noise)))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return drawn(self, pipeline, noise, *arguments)

    monkeypatch.setattr(type(model.family), "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        draw_cell(drawing, model, TEXTS, tmp_path / "samples", tmp_path / "pictures", runtime)
    assert not (tmp_path / "samples").exists()
    batches.clear()
    monkeypatch.setattr(type(model.family), "sample", lambda *a: batches.append(range(2)) or original(*a))
    assert draw_cell(drawing, model, TEXTS, tmp_path / "samples", tmp_path / "pictures", runtime)
    assert len(batches) == 2, "the first shard of four pictures was there"
    expected = Store(places.samples("base", "scored")).all()["images"].int()
    assert (Store(tmp_path / "samples").all()["images"].int() - expected).abs().max() <= 1
    assert not draw_cell(drawing, model, TEXTS, tmp_path / "samples", tmp_path / "pictures", runtime)
    assert len(batches) == 2, "what is there is not drawn again"


def test_a_new_model_draws_its_own_pictures_only(
    judged: tuple[Judging, Places], two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = judged[1]
    more = changed(two, "models.third", {**two["models"]["base"], "title": "Third", "steps": 1})
    made: list[tuple[str, str]] = []
    for name in ("draw_cell", "measure_cell"):
        original = getattr(run, name)

        def follow(*arguments: Any, original: Callable[..., Any] = original, name: str = name) -> Any:
            done = original(*arguments)
            if done:
                made.append((name, arguments[0].row if name == "draw_cell" else arguments[2]))
            return done

        monkeypatch.setattr(run, name, follow)
    standing = run.judge(validated(Judging, more | {"rows": ["base", "other", "third"]}), places.root)
    assert made == [("draw_cell", "third"), ("measure_cell", "third")] * 2
    assert standing.missing == []
    made.clear()
    run.judge(validated(Judging, two), places.root)
    assert made == []


def test_a_model_that_changed_meanwhile_is_not_drawn(
    judged: tuple[Judging, Places], tiny_pipeline: Callable[[str], Path]
) -> None:
    judging, places = judged
    swapped = judging.models["base"].model_copy(update={"source": str(tiny_pipeline("longcat"))})
    other = judging.model_copy(update={"models": judging.models | {"base": swapped}})
    with pytest.raises(CdmError, match=r"models\.base: changed since the cells were worked out"):
        run.draw(other, places, "base", "scored", Memory())


# Measuring.


def test_figures_are_those_of_the_pipelines_own_evaluation(judged: tuple[Judging, Places]) -> None:
    """Student and teacher measured together, as the stage `evaluate` does it, have the figures of two cells."""
    judging, places = judged
    sets = [
        SampleSet(role, 2, store.fact("evaluations", int), store)
        for role, row in (("student", "other"), ("teacher", "base"))
        for store in [Store(places.samples(row, "scored"))]
    ]
    samples = Samples([sets[0]], [sets[1]], sets[1], TEXTS, 1, "", "")
    found = measure_chosen(judging.evaluation("scored"), samples, None, Path(), seed=0, runtime=judging.runtime)
    assert found is not None
    for row, role in (("other", "student"), ("base", "teacher")):
        result = Result.read(places.result(row, "scored"))
        assert result is not None
        assert result.figures == found.figures[role]["steps2"]
        assert result.replicates["prompts"] == found.replicates[role]["steps2"]
    difference = Standing(judging, {("other", "scored"): Result.read(places.result("other", "scored")),
                                    ("base", "scored"): Result.read(places.result("base", "scored"))}).difference(
        "other", "scored", "clip_score")  # fmt: skip
    value, low, high = found.differences["student"]["steps2"]["clip_score"]
    assert difference is not None
    assert difference.value == pytest.approx(value, abs=1e-4)
    assert difference.reach == pytest.approx((high - low) / 2, rel=1e-3)


def test_a_reference_has_no_distance_to_itself(judged: tuple[Judging, Places]) -> None:
    own, other = (Result.read(judged[1].result(row, "judged")) for row in ("base", "other"))
    assert own is not None
    assert other is not None
    assert "attribute_accuracy" in own.figures
    assert not {"frechet_distance", "style_distance"} & own.figures.keys()
    assert other.figures["frechet_distance"] > 0
    assert len(other.replicates["noise"]["frechet_distance"]) == 4


def test_a_judge_sees_pictures_of_one_size(two: dict[str, Any], tmp_path: Path) -> None:
    judging = validated(Judging, changed(two, "models.other.resolution", 64))
    with pytest.raises(
        CdmError, match=r"^models\.other: draws 64 x 64 pixels, and base draws 32 x 32: the judge of judged"
    ):
        resolve(judging, Places(tmp_path), Memory())
    scored = validated(Judging, changed(two, "models.other.resolution", 64) | {"sets": ["scored"]})
    assert set(resolve(scored, Places(tmp_path), Memory())) == {"base", "other"}


def test_a_damaged_result_is_a_line(judged: tuple[Judging, Places], tmp_path: Path) -> None:
    assert Result.read(tmp_path / "none.json") is None
    text = judged[1].result("base", "scored").read_text()
    (tmp_path / "odd.json").write_text(text.replace('"figures": {', '"figures": {"clip_score": "high",', 1))
    with pytest.raises(CdmError, match=r"odd\.json: damaged: remove it and judge again"):
        Result.read(tmp_path / "odd.json")


# Tables.


def test_the_table_fits_a_terminal_and_has_every_row(standing: Standing) -> None:
    text = tables.text_table(standing)
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert "Scored: 8 prompts, 1 picture a prompt" in text
    assert "Judged: 2 prompts, 4 pictures a prompt" in text
    assert re.search(r"^  Model base +4 +[\d.]+ ± [\d.]+$", text, re.MULTILINE)
    assert re.search(r"^  Model other +2 +[\d.]+ ± [\d.]+( [+-])?$", text, re.MULTILINE)
    assert re.search(r"^    Model other +[+\u2212][\d.]+ ± [\d.]+$", text, re.MULTILINE)


def test_a_figure_that_needs_too_many_columns_goes_to_the_next_block() -> None:
    assert list(tables._blocks([30, 30, 30, 10])) == [[0, 1], [2, 3]]
    assert list(tables._blocks([200])) == [[0]]


def test_the_csv_has_a_row_a_cell_and_figure(standing: Standing) -> None:
    rows = list(csv.DictReader(tables.as_csv(standing).splitlines()))
    assert {(row["set"], row["model"]) for row in rows} == {
        (name, model) for name in ("scored", "judged") for model in ("base", "other")
    }
    (own,) = [row for row in rows if row["model"] == "base" and row["figure"] == "clip_score"]
    assert own["difference"] == ""
    (other,) = [row for row in rows if row["model"] == "other" and row["figure"] == "clip_score"]
    assert float(other["low"]) < float(other["value"]) < float(other["high"])
    assert float(other["difference"]) == pytest.approx(float(other["value"]) - float(own["value"]), abs=1e-4)
    assert float(other["difference_low"]) < float(other["difference"]) < float(other["difference_high"])


def test_the_page_has_the_same_prompts_side_by_side(judged: tuple[Judging, Places], standing: Standing) -> None:
    html = render(standing, judged[1])
    assert html.count("<img ") == 2 * (8 + 2), "each prompt of each set, a picture a model"
    assert "<script" not in html
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html).replace("http-equiv", "")
    assert re.search(r'alt="Model other: a red two on black paper"', html)
    png = judged[1].pictures("other", "scored") / "000000.png"
    with Image.open(png) as image:
        assert image.info["prompt"] == TEXTS[0]


def test_a_cell_without_a_result_is_named(standing: Standing) -> None:
    results = {cell: each for cell, each in standing.results.items() if cell != ("other", "judged")}
    partial = Standing(standing.judging, results)
    assert partial.missing == ["other-judged"]
    assert "Cells without a result: other-judged" in tables.text_table(partial)


def test_a_result_of_other_measures_is_left_out(
    judged: tuple[Judging, Places], standing: Standing, tmp_path: Path
) -> None:
    """As long as the pictures are there, which Git does not have."""
    judging, places = judged
    moved = Places(tmp_path / "moved")
    shutil.copytree(places.root, moved.root)
    moved.measuring("scored").write_text("{}")
    found = Standing.read(judging, moved)
    assert found.outdated == ("base-scored", "other-scored")
    assert found.missing == []
    assert "left out: base-scored, other-scored" in tables.text_table(found)
    shutil.rmtree(moved.root / "samples")
    assert Standing.read(judging, moved).results == standing.results


# Published figures.


def known(standing: Standing, published: float, tolerance: float) -> Standing:
    """The same where a publication has a figure of the reference, and another one of a model that is not judged."""
    plain = standing.judging.model_dump(mode="json")
    plain["models"]["base"]["published"] = {"scored": {"clip_score": published}}
    plain["models"]["paper"] = {"title": "Paper", "published": {"scored": {"clip_score": 12.3, "hps": 0.3}}}
    plain["agreement"] = {"models": ["base"], "tolerance": {"clip_score": tolerance}}
    return replace(standing, judging=validated(Judging, plain))


def test_the_verdict_goes_by_the_tolerance_and_by_chance(standing: Standing) -> None:
    figure = standing.figure("base", "scored", "clip_score")
    assert figure is not None
    assert figure.reach is not None
    value, reach = figure.value, figure.reach
    assert standing.verdict() is None
    near = known(standing, value + 0.9 * reach, reach)
    assert near.verdict() == (
        "The measuring agrees with the published figures: all 1 of the known models are within the tolerance."
    )
    unclear = known(standing, value + 1.5 * reach, reach)
    assert str(unclear.verdict()).startswith(
        "Too few pictures to tell whether the measuring agrees: CLIPScore of"
    )
    far = known(standing, value + 2.5 * reach, reach)
    assert str(far.verdict()).startswith(
        "The measuring does not agree with the published figures: CLIPScore of Model"
    )
    assert "DIFFERS" in tables.text_table(far)
    assert "| DIFFERS |" in tables.markdown(far, "")


def test_published_figures_stand_beside_the_measured_ones(
    judged: tuple[Judging, Places], standing: Standing
) -> None:
    both = known(standing, 11.0, 1.0)
    text = tables.text_table(both)
    assert re.search(r"^    published +11\.00$", text, re.MULTILINE)
    assert re.search(r"^  Paper +published +12\.30 +0\.300$", text, re.MULTILINE)
    html = render(both, judged[1])
    assert "published 11.00" in html
    assert "Paper, published" in html


def test_a_known_model_that_was_not_measured_is_named(standing: Standing) -> None:
    lacking = known(standing, 11.0, 1.0)
    plain = lacking.judging.model_dump(mode="json")
    plain["models"]["base"]["published"]["scored"]["hps"] = 0.3
    plain["agreement"]["tolerance"]["hps"] = 0.1
    text = replace(standing, judging=validated(Judging, plain)).verdict()
    assert str(text).endswith("Not measured: HPS v2 of Model base.")


SCORER = """
import json, sys
request = json.load(open(sys.argv[-2]))
json.dump({"scores": {"score": [len(each["prompt"]) / 10 for each in request["images"]]}}, open(sys.argv[-1], "w"))
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Callable[[str], Path]) -> None:
    """In a home and a hub's cache of their own, something tiny for whatever the files in judging/ name."""
    import huggingface_hub

    home, cache, commit = tmp_path / "home", tmp_path / "hub", 40 * "0"
    sets = home / "cdm-sets"
    for name in ("hpsv3", "ella", "image-reward"):
        program = home / f"envs/{name}/bin/python"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {home}/scorer.py "$@"\n')
        program.chmod(0o755)
    (home / "scorer.py").write_text(SCORER)
    for folder in ("pickscore", "annotations", "ELLA/dpg_bench/prompts"):
        (sets / folder).mkdir(parents=True)
    (sets / "pickscore/test.txt").write_text("\n".join(TEXTS))
    for number, text in enumerate(TEXTS):
        (sets / f"ELLA/dpg_bench/prompts/{number}.txt").write_text(text)
    captions = [{"image_id": number, "id": number, "caption": text} for number, text in enumerate(TEXTS)]
    (sets / "annotations/captions_val2017.json").write_text(json.dumps({"annotations": captions}))
    write_aesthetic(sets / "sac+logos+ava1-l14-linearMSE.pth")
    write_inception(sets / "weights-inception-2015-12-05-6726825d.pth")
    write_clip(sets / "hps", seed=6)
    hub = {
        "openai/clip-vit-large-patch14": write_clip(tmp_path / "clip"),
        "yuvalkirstain/PickScore_v1": write_clip(tmp_path / "pick", seed=5),
        "stabilityai/stable-diffusion-3-medium-diffusers": tiny_pipeline("sd3_t5"),
        "byliutao/stable-diffusion-3-medium-turbo": tiny_pipeline("sd3"),
        "meituan-longcat/LongCat-Image": tiny_pipeline("longcat"),
        "byliutao/Longcat-Image-Turbo": tiny_pipeline("longcat"),
        "stabilityai/stable-diffusion-3.5-large": tiny_pipeline("sd3_t5"),
        "stabilityai/stable-diffusion-3.5-large-turbo": tiny_pipeline("sd3"),
    }
    for name, folder in hub.items():
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(commit)
        (place / "snapshots").mkdir()
        (place / "snapshots" / commit).symlink_to(folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "paper-sd3",
        pytest.param("paper-longcat", marks=pytest.mark.nightly),
        pytest.param("teacher-coco", marks=pytest.mark.nightly),
    ],
)
def test_the_files_that_are_ready_run_on_stand_ins(name: str, stand_ins: None, tmp_path: Path) -> None:
    """Every name in them is looked up; but for the resolution and COCO's count they run as they are."""
    plain = YAML(typ="safe").load((ROOT / f"judging/{name}.yaml").read_text())
    for model in plain["models"].values():
        model["resolution"] = tiny_pipelines.RESOLUTION
    if "coco" in plain["prompts"]:
        plain["prompts"]["coco"]["count"] = len(TEXTS)
    judging = validated(Judging, plain)
    standing = run.judge(judging, tmp_path / "out")
    text = tables.text_table(standing)
    assert standing.missing == []
    assert standing.unchecked() == [], "every known figure with a tolerance is measured"
    assert {each.row for each in standing.checks()} == set(judging.rows)
    assert "does not agree with the published figures" in str(standing.verdict()), "random models are others"
    for model in judging.models.values():
        assert tables.cut(model.title) in text
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    (tmp_path / "home/cdm-sets/sac+logos+ava1-l14-linearMSE.pth").unlink()
    if "aesthetic" in text.lower():
        with pytest.raises(CdmError, match=r"^metric_models: not on this machine: aesthetic .*`cdm fetch "):
            run.judge(judging, tmp_path / "out")


# The command.


def test_an_argument_is_a_place_and_how_it_draws() -> None:
    assert parse_model("models/student") == {"source": "models/student"}
    assert parse_model("org/name,steps=50,guidance=4.5,revision=main") == {
        "source": "org/name",
        "steps": 50,
        "guidance_scale": 4.5,
        "revision": "main",
    }
    assert parse_model("x,sigmas=1/0.75/0.5,tokens=256")["sigmas"] == [1.0, 0.75, 0.5]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("x,stepz=4", "MODEL x,stepz=4: 'stepz=4' is none of name=, steps="),
        ("x,steps", "MODEL x,steps: 'steps' is none of"),
        ("x,steps=four", "MODEL x,steps=four: steps is 'four', expected a number"),
        ("x,sigmas=1-2", "MODEL x,sigmas=1-2: sigmas is '1-2', expected numbers with / between them"),
        ("x,steps=0", "MODEL x,steps=0: steps: input should be greater than or equal to 1, not 0"),
        ("x,precision=int8", "MODEL x,precision=int8: precision: input should be"),
    ],
)
def test_an_argument_that_is_none_is_a_line(argument: str, says: str) -> None:
    with pytest.raises(CdmError, match=f"^{re.escape(says)}"):
        judging_of([argument], [Path("prompts.txt")], metrics=["clip_score"])


def test_models_have_names_of_their_own_and_the_first_is_the_reference() -> None:
    arguments = ["a/student", "b/student", "b/student,steps=8", "c/best.safetensors,name=Our best"]
    judging = judging_of(arguments, [Path("x.txt")], metrics=["clip_score"], seed=3)
    assert judging.rows == ["student", "student-2", "student-8-steps", "our-best"]
    assert judging.models["our-best"].title == "Our best"
    assert judging.reference == "student"
    assert judging.seed == 3
    assert judging_of(arguments, [Path("x.txt")], "Our best", metrics=["clip_score"]).reference == "our-best"
    with pytest.raises(CdmError, match="--reference is nobody: give one of the models: student, student-2"):
        judging_of(arguments, [Path("x.txt")], "nobody", metrics=["clip_score"])


def test_the_command_makes_a_judging_of_its_options(
    judged: tuple[Judging, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Judging, Path]] = []

    def follow(judging: Judging, out: Path) -> Standing:
        asked.append((judging, out))
        return Standing.read(*judged)

    monkeypatch.setattr(run, "judge", follow)
    arguments = [
        "judge",
        "one,steps=8",
        "two",
        "--prompts",
        "a.txt",
        "--prompts",
        "b.txt",
        "--measure",
        "clip_score",
    ]
    more = [
        "--reference",
        "two",
        "--per-prompt",
        "3",
        "--seed",
        "7",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert "Scored: 8 prompts, 1 picture a prompt" in done.output
    ((judging, out),) = asked
    assert out == tmp_path / "out"
    assert (judging.rows, judging.reference, judging.seed) == (["one-8-steps", "two"], "two", 7)
    assert judging.precision == "fp32", "auto, on a CPU"
    assert judging.prompts["prompts"].files == ["a.txt", "b.txt"]
    assert judging.prompts["prompts"].per_prompt == 3


# The pipeline.


@pytest.fixture(scope="module")
def repository(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A judging of the tiny teacher and of the miniature on two prompt sets, not yet run."""
    folder, home = (tmp_path_factory.mktemp(name) for name in ("judging", "home"))
    repository = make_repository(folder, home, tiny_pipeline("sd3"), "judging")
    made = [
        "cells",
        "results",
        "pictures",
        "samples",
        "page",
        "dvc.lock",
        "table.md",
        "table.csv",
        ".hashes.json",
    ]
    repository.run("rm", "-rf", *(f"judging/{name}" for name in made))
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    sources = {
        "base": Path("world/teacher"),
        "other": tiny_pipeline("longcat"),
        "miniature": ROOT / "miniature/teacher",
    }
    chosen = values(Path(), sources, write_clip(folder / "clip"))
    chosen["models"]["other"] |= {"max_sequence_length": tiny_pipelines.TEXT_TOKENS["longcat"]}
    chosen["rows"] = ["base", "miniature"]
    write(folder, chosen)
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "judging")
    return repository


def write(folder: Path, values: dict[str, Any]) -> None:
    with (folder / "judging/params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)


@pytest.mark.slow
class TestPipeline:
    """In this order: each goes on where the one before it stopped."""

    def cells_run(self, repository: Repository) -> tuple[list[str], list[str], list[str]]:
        """The cells that `dvc repro` draws and measures, and the other stages that it runs."""
        ran = repository.stages_run("--cd", "judging", "repro")
        drawn, measured = (
            sorted(each.partition("@")[2] for each in ran if each.startswith(f"{stage}@"))
            for stage in ("draw", "measure")
        )
        return drawn, measured, [each for each in ran if "@" not in each]

    def test_two_models_and_two_prompt_sets_make_a_table(self, repository: Repository) -> None:
        drawn, measured, others = self.cells_run(repository)
        expected = [f"{row}-{name}" for row in ("base", "miniature") for name in ("judged", "scored")]
        assert drawn == measured == expected
        assert others == ["resolve", "table"]
        folder = repository.folder / "judging"
        page = (folder / "table.md").read_text()
        assert "| Model miniature | 2 |" in page
        assert "*difference to Model base*" in page
        assert (folder / "page/index.html").read_text().count("<img ") == 2 * (8 + 2)
        with (folder / "table.csv").open() as file:
            assert {row["model"] for row in csv.DictReader(file)} == {"base", "miniature"}

    def test_a_third_model_runs_its_own_cells(self, repository: Repository) -> None:
        path = repository.folder / "judging/params.yaml"
        chosen = YAML(typ="safe").load(path)
        before = {each: each.read_bytes() for each in (repository.folder / "judging/results").rglob("*.json")}
        write(repository.folder, chosen | {"rows": [*chosen["rows"], "other"]})
        drawn, measured, others = self.cells_run(repository)
        assert drawn == measured == ["other-judged", "other-scored"]
        assert others == ["resolve", "table"]
        assert len(before) == 4
        assert all(each.read_bytes() == content for each, content in before.items())
        assert "| Model other | 2 |" in (repository.folder / "judging/table.md").read_text()

    def test_what_is_asked_again_runs_nothing(self, repository: Repository) -> None:
        assert self.cells_run(repository) == ([], [], ["resolve"])

    def test_a_change_of_a_prompt_set_reruns_its_cells_and_not_the_student(
        self, repository: Repository
    ) -> None:
        path = repository.folder / "judging/params.yaml"
        chosen = YAML(typ="safe").load(path)
        write(repository.folder, changed(chosen, "prompts.scored.resamples", 50) | {"rows": ["base", "other"]})
        drawn, measured, others = self.cells_run(repository)
        assert drawn == []
        assert measured == ["base-scored", "other-scored"]
        assert others == ["resolve", "table"]
        assert not (repository.folder / "models").exists(), "the repository's own pipeline has not run at all"

    def test_a_mistake_is_a_line_of_the_first_stage(self, repository: Repository) -> None:
        path = repository.folder / "judging/params.yaml"
        chosen = YAML(typ="safe").load(path)
        write(repository.folder, changed(chosen, "models.other.source", "nowhere"))
        with pytest.raises(
            AssertionError, match=r"error: models\.other\.source: nowhere: no such folder or file"
        ):
            repository.dvc("--cd", "judging", "repro")
        write(repository.folder, chosen)
