"""The comparison: matched guidance, equal updates and cost, intervals, tables of a partial state, and its pipeline."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from scipy import stats

from cdm.errors import CdmError
from cdm.evaluation.theme import DARK, LIGHT
from cdm.evaluation.theme import METHODS as NAMED
from cdm.params import Params, changed, load, parse
from cdm.planning.forwards import forwards_of_round, mean_anchor_sigma
from cdm.system.files import sha256
from comparison import design, figure, results, table
from comparison.collect import METRICS, Collected, collect
from comparison.design import Comparison
from comparison.results import Result, Summary, TeacherResult, estimate, result_path
from tests import code
from tests.repository import ROOT, Repository, make_repository

SHIFT = 3.0
LOSSES = {
    "ca": {"weight": 1.0, "scale": 0.9, "bounded": True},
    "dm": {"weight": 1.0, "bounded": True},
    "cdm": {"weight": 0.25, "bounded": True},
}
METHODS: dict[str, Any] = {
    "ours": {"title": "Ours"},
    "fixed": {"title": "Fixed list", "set": {"schedule.kind": "fixed", "distill.losses.cdm.weight": 0}},
    "unguided": {"title": "No CA", "set": {"distill.losses.ca.weight": 0}, "guidance": "own"},
    "longer": {"title": "Longer", "updates": 2.0},
}
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load(ROOT / "comparison/dvc.yaml")["stages"]


@pytest.fixture
def base() -> Params:
    """Parameters of 100 student updates behind 8 rounds of the fake score alone."""
    values = load(ROOT / "params.yaml").model_dump(mode="json")
    values["schedule"] |= {"kind": "dynamic", "min_len": 4, "max_len": 8, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    values["distill"] |= {
        "iterations": 432,
        "student_every": 4,
        "fake_only": 32,
        "batch_size": 48,
        "losses": LOSSES,
    }
    return parse(values)


def comparison(**changes: Any) -> Comparison:
    values = {
        "seeds": [0, 1, 2],
        "steps": [1, 2, 4],
        "reference": "ours",
        "updates": ["ours", "fixed"],
        "cost": ["fixed"],
        "ablations": ["unguided", "longer"],
        "methods": METHODS,
    }
    return Comparison.model_validate(values | changes)


def cells(base: Params, **changes: Any) -> dict[tuple[str, str], Params]:
    return {(table, name): params for table, name, params in design.cells(comparison(**changes), base, SHIFT)}


# Settings.


def test_a_change_reaches_its_key_and_nothing_else(base: Params) -> None:
    values = base.model_dump(mode="json")
    found = changed(values, {"schedule.max_len": 6, "distill.losses.ca.scale": 0.5, "seed": 3})
    assert found["schedule"] == values["schedule"] | {"max_len": 6}
    assert found["distill"]["losses"]["ca"] == values["distill"]["losses"]["ca"] | {"scale": 0.5}
    assert found["distill"]["losses"]["dm"] == values["distill"]["losses"]["dm"]
    assert found["seed"] == 3
    assert values["schedule"]["max_len"] == 8, "the given values stay as they are"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule.max_length": 6}, "schedule.max_length: unknown key"),
        ({"schedules.max_len": 6}, "schedules: unknown key"),
        ({"distill.losses.gan.weight": 6}, "distill.losses.gan: unknown key"),
        ({"schedule.max_len": 1}, "max_len 1 is below min_len 4"),
    ],
)
def test_a_change_that_cannot_be_made_is_named_with_its_method(
    base: Params, changes: dict[str, Any], message: str
) -> None:
    methods = METHODS | {"fixed": {"title": "Fixed", "set": changes}}
    with pytest.raises(CdmError, match=f"methods.fixed: .*{re.escape(message)}"):
        cells(base, methods=methods)


def test_a_recipe_gives_schedule_and_training_and_the_repository_the_data(base: Params, tmp_path: Path) -> None:
    recipe = base.model_dump(mode="json", exclude={"runtime"})
    recipe["schedule"]["max_len"] = 5
    recipe["distill"]["ema"] = 0.9
    recipe["latents"] |= {"steps": 7, "train_pairs": 9}
    recipe["seed"] = 11
    (tmp_path / "short.yaml").write_text(json.dumps(recipe))
    method = design.Method(title="Short", recipe="short", set={"schedule.min_len": 2})
    found = design.own_settings(method, base, tmp_path)
    assert found.schedule == base.schedule.model_copy(update={"max_len": 5, "min_len": 2})
    assert found.distill == base.distill.model_copy(update={"ema": 0.9})
    assert found.seed == base.seed
    assert found.latents == base.latents.model_copy(update={"train_pairs": 9}), "its pairs are its own"
    with pytest.raises(CdmError, match=r"missing\.yaml: cannot be read"):
        design.own_settings(design.Method(title="", recipe="missing"), base, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": ["fixed", "fixed"]}, "cost names a method twice"),
        ({"ablations": ["nobody"]}, "ablations: nobody is not defined"),
        ({"reference": "fixed"}, "cost names the reference fixed"),
        ({"reference": "longer", "ablations": []}, "reference longer is not in updates"),
        ({"repeats": 3}, "repeats"),
    ],
)
def test_an_inconsistent_comparison_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps({**comparison().model_dump(mode="json"), **changes}))
    with pytest.raises(CdmError, match=re.escape(message)) as caught:
        design.load_comparison(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


# Guidance.


def force(params: Params, fake: float, cond: float, uncond: float) -> float:
    """What the weighted terms do to a student whose distribution has x0 = `fake`."""
    losses = params.distill.losses
    total = losses.ca.weight * losses.ca.scale * (cond - uncond)
    for term in (losses.dm, losses.cdm, losses.sgmd, losses.consistency):
        total += term.weight * (uncond + term.guidance_scale * (cond - uncond) - fake)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ca.weight": 0.5, "dm.weight": 2.0},
        {"ca.weight": 0.0, "cdm.weight": 0.0, "dm.guidance_scale": 1.7},
        {"dm.guidance_scale": 2.0, "cdm.guidance_scale": 1.2},
        {"ca.weight": 0.0, "dm.weight": 0.0, "cdm.weight": 0.0, "sgmd.weight": 3.0, "sgmd.guidance_scale": 2.5},
    ],
)
def test_guidance_is_where_the_directions_cancel(base: Params, changes: dict[str, float]) -> None:
    changes = {f"distill.losses.{key}": value for key, value in changes.items()}
    params = parse(changed(base.model_dump(mode="json"), changes))
    strength = design.guidance_strength(params, SHIFT)
    assert strength is not None
    cond, uncond = 0.3, -0.5
    assert force(params, cond + strength * (cond - uncond), cond, uncond) == pytest.approx(0)
    matched = design.with_guidance(params, 0.6, SHIFT)
    assert design.guidance_strength(matched, SHIFT) == pytest.approx(0.6, rel=1e-5)
    assert force(matched, cond + 0.6 * (cond - uncond), cond, uncond) == pytest.approx(0, abs=1e-5)


def test_a_scale_that_fades_counts_as_on_average(base: Params) -> None:
    assert design.mean_fade(base, SHIFT) == 1
    fading = parse(changed(base.model_dump(mode="json"), {"distill.losses.ca.fade": 1.0}))
    assert design.mean_fade(fading, SHIFT) == pytest.approx(mean_anchor_sigma(base.schedule, SHIFT), rel=1e-4)
    fixed = parse(changed(fading.model_dump(mode="json"), {"schedule.kind": "fixed"}))
    assert design.mean_fade(fixed, 1.0) == pytest.approx((1 + 0.75 + 0.5 + 0.25) / 4)


def test_methods_are_compared_at_the_references_guidance(base: Params) -> None:
    guided = {
        "title": "Guided",
        "set": {"distill.losses.ca.weight": 0, "distill.losses.dm.guidance_scale": 3.0},
    }
    found = cells(base, updates=["ours", "fixed", "guided"], methods=METHODS | {"guided": guided})
    assert design.guidance_strength(found["updates", "ours"], SHIFT) == pytest.approx(0.9 / 1.25)
    assert found["updates", "ours"].distill == base.distill, "the reference is as it is"
    fixed = found["updates", "fixed"].distill.losses
    assert fixed.ca.scale == pytest.approx(0.72), "without the CDM term nothing dilutes CA"
    assert found["updates", "guided"].distill.losses.dm.guidance_scale == pytest.approx(1 + 0.72 * 1.25)
    assert found["ablations", "unguided"].distill.losses.ca.weight == 0


def test_guidance_that_cannot_be_matched_is_said(base: Params) -> None:
    methods = METHODS | {"unguided": METHODS["unguided"] | {"guidance": "matched"}}
    with pytest.raises(CdmError, match=r"methods\.unguided: .*because it has none: set guidance to own"):
        cells(base, methods=methods)


# Updates and cost.


def test_updates_are_equal_whatever_a_method_spends_on_its_fake_score(base: Params) -> None:
    often = {"title": "Often", "set": {"distill.student_every": 2, "distill.fake_only": 0}}
    found = cells(base, updates=["ours", "fixed", "often"], methods=METHODS | {"often": often})
    assert {
        name: design.student_updates(params) for (table, name), params in found.items() if table == "updates"
    } == {
        "ours": 100,
        "fixed": 100,
        "often": 100,
    }
    assert found["updates", "ours"].distill.iterations == 432
    assert found["updates", "often"].distill.iterations == 200
    assert design.student_updates(found["ablations", "longer"]) == 200


def test_cost_is_equal_to_half_a_round(base: Params) -> None:
    found = cells(base)
    ours, fixed = found["updates", "ours"], found["cost", "fixed"]
    a_round = 48 * forwards_of_round(fixed.distill, fixed.schedule, SHIFT).equivalents
    cost = design.forward_equivalents(ours, SHIFT)
    assert abs(design.forward_equivalents(fixed, SHIFT) - cost) <= a_round / 2
    assert design.student_updates(fixed) > 100, "a cheaper round leaves room for more updates"
    assert design.forward_equivalents(found["updates", "fixed"], SHIFT) < cost


def test_cost_counts_every_round_of_the_batch(base: Params) -> None:
    """By hand, for 4 fixed levels, CA and DM at one point: 1.5 steps to an anchor on average."""
    found = cells(base)["updates", "fixed"]
    alone = 1.5 + 1 + 4 * 3  # rollout, the student at the anchor, four updates of the fake score
    both = (
        1.5 + 3 + 4 * 3 + 2 + 1
    )  # the student with its backward; teacher and fake score; the unconditional teacher
    assert design.forward_equivalents(found, SHIFT) == pytest.approx(48 * (8 * alone + 100 * both))


def test_a_round_dearer_than_the_whole_reference_is_refused(base: Params) -> None:
    dear = {"title": "Dear", "set": {"distill.fake_only": 800, "distill.iterations": 804}}
    with pytest.raises(CdmError, match=r"methods\.dear: costs .* more than the reference's"):
        cells(base, cost=["dear"], methods=METHODS | {"dear": dear})


def test_pairs_of_a_regression_count_as_cost(base: Params) -> None:
    changes = {
        "latents": {"steps": 50, "per_prompt": 16, "train_pairs": 10},
        "distill.losses.regression.weight": 0.25,
    }
    params = parse(changed(base.model_dump(mode="json"), changes))
    a_round = 48 * forwards_of_round(params.distill, params.schedule, SHIFT).equivalents
    alone = 48 * forwards_of_round(params.distill, params.schedule, SHIFT, learns=False).equivalents
    expected = 10 * 50 * 2 + 8 * alone + 100 * a_round
    assert design.forward_equivalents(params, SHIFT) == pytest.approx(expected)


def test_cells_draw_the_student_alone(base: Params) -> None:
    short = {"title": "Short", "steps": [1, 3, 4], "set": {"distill.ema": 0.5}}
    found = cells(base, updates=["ours", "fixed", "short"], methods=METHODS | {"short": short})
    for (_, name), params in found.items():
        assert params.sample.steps == ([1, 4] if name == "short" else [1, 2, 4])
        assert params.sample.teacher_steps == []
        assert (params.teacher, params.seed) == (base.teacher, base.seed)


def test_the_repositorys_comparison_can_be_resolved() -> None:
    """Every method of comparison/params.yaml is valid, is in a table, and has the reference's guidance."""
    found = design.load_comparison(ROOT / "comparison/params.yaml")
    base = load(ROOT / "params.yaml")
    resolved = list(design.cells(found, base, SHIFT, ROOT / "recipes"))
    assert {name for _, name, _ in resolved} == set(found.methods)
    reference = next(params for _, name, params in resolved if name == found.reference)
    own = design.own_settings(found.methods[found.reference], base, ROOT / "recipes")
    assert (reference.schedule, reference.distill) == (own.schedule, own.distill), "the reference is as it is"
    strength = design.guidance_strength(reference, SHIFT)
    for _, name, params in resolved:
        if found.methods[name].guidance == "matched":
            assert design.guidance_strength(params, SHIFT) == pytest.approx(strength, rel=1e-4), name
    assert len({params.model_dump_json() for _, _, params in resolved}) == len(resolved), (
        "two cells are the same"
    )
    assert len(found.seeds) >= 3


# Intervals.


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.7], [float(i * i) for i in range(10)]])
def test_intervals_are_students(values: list[float]) -> None:
    found = estimate(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-5)


def test_a_single_seed_has_no_interval() -> None:
    assert estimate([2.0]) == results.Estimate(2.0, None, 1)
    assert not estimate([2.0]).excludes_zero
    with pytest.raises(ValueError, match="0 values"):
        estimate([])


def made(method: str, seed: int, frechet: float, *, settings: str = "", **row: float) -> Result:
    rows = {
        f"steps{steps}": {"evaluations": steps, "frechet_distance": frechet / steps, **row}
        for steps in (1, 2, 4)
    }
    return Result(method, seed, settings, "code", "2.13.0", 100, 1.5e6, 0.72, rows)


def test_a_difference_is_taken_seed_by_seed() -> None:
    """Seeds differ by far more than the methods, which the paired interval does not mind."""
    ours = Summary(
        "ours", "Ours", {seed: made("ours", seed, level) for seed, level in enumerate((1.0, 5.0, 9.0))}
    )
    other = Summary("x", "X", {seed: made("x", seed, level) for seed, level in enumerate((1.1, 5.12, 9.09))})
    alone, difference = (
        other.over_seeds("steps1", "frechet_distance"),
        other.against(ours, "steps1", "frechet_distance"),
    )
    assert alone is not None
    assert alone.half is not None
    assert alone.half > 5
    assert difference is not None
    assert difference.excludes_zero
    assert difference.mean == pytest.approx(0.31 / 3)
    assert table.verdict(difference, METRICS[0]) == " ▼", "a larger distance is worse"
    assert ours.against(other, "steps1", "recall") is None
    assert other.changes(ours, "steps1", "frechet_distance") == pytest.approx([0.1, 0.12, 0.09])
    assert other.changes(ours, "steps2", "frechet_distance", ratio=True) == pytest.approx([1.1, 1.024, 1.01])
    lonely = Summary("y", "Y", {3: made("y", 3, 1.0)})
    assert lonely.changes(ours, "steps1", "frechet_distance") == [], "no seed in common"


# Tables.


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Files of cells, and a partial state of results: a method without a seed, another without any, one outdated."""
    settings, found = tmp_path / "cells", tmp_path / "results"
    for name in (
        "teacher",
        "updates/ours",
        "updates/fixed",
        "cost/fixed",
        "ablations/unguided",
        "ablations/longer",
    ):
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / f"{name}.yaml").write_text(name)
    digest = {name: sha256(settings / f"{name}.yaml") for name in ("teacher", "updates/ours", "updates/fixed")}
    for seed in range(3):
        ours = made(
            "ours",
            seed,
            1.0 + seed / 5,
            settings=digest["updates/ours"],
            attribute_accuracy=0.8,
            diversity=5.0,
        )
        ours.write(result_path(found, "updates", "ours", seed))
    for seed in range(2):
        fixed = made(
            "fixed",
            seed,
            2.0 + seed / 10,
            settings=digest["updates/fixed"],
            attribute_accuracy=0.9,
            diversity=5.2,
        )
        fixed.write(result_path(found, "updates", "fixed", seed))
    made("fixed", 0, 2.0, settings="of before").write(result_path(found, "cost", "fixed", 0))
    rows = {
        f"steps{s}": {"evaluations": 2 * s, "frechet_distance": 30.0 / s, "attribute_accuracy": 0.5}
        for s in (1, 2, 50)
    }
    unguided = {
        f"steps{s}": {"evaluations": s, "frechet_distance": 50.0 / s, "attribute_accuracy": 0.4}
        for s in (1, 2, 4)
    }
    TeacherResult(digest["teacher"], rows, unguided, {"frechet_distance": 0.07}).write(found / "teacher.json")
    return settings, found


@pytest.fixture
def found(folders: tuple[Path, Path]) -> Collected:
    return collect(comparison(), *folders)


def test_a_partial_state_is_collected(found: Collected) -> None:
    assert [(name, row.method, sorted(row.results)) for name, row in found.summaries] == [
        ("updates", "ours", [0, 1, 2]),
        ("updates", "fixed", [0, 1]),
        ("cost", "ours", [0, 1, 2]),
        ("ablations", "ours", [0, 1, 2]),
    ]
    assert found.outdated == ["cost@fixed-0"]
    assert found.missing[:3] == ["updates@fixed-2", "cost@fixed-1", "cost@fixed-2"]
    assert len(found.missing) == 3 + 6


def test_results_survive_their_file(tmp_path: Path) -> None:
    result = made("ours", 1, 2.5, recall=0.4)
    path = result_path(tmp_path, "cost", "ours", 1)
    result.write(path)
    assert path == tmp_path / "cost/ours-1.json"
    assert Result.read(path) == result
    path.write_text('{"method": "ours"}')
    with pytest.raises(CdmError, match="not a result of a cell"):
        Result.read(path)


def test_the_table_for_people(found: Collected) -> None:
    lines = table.markdown(found).splitlines()
    half = 4.30265 * 0.2 / math.sqrt(3)
    assert f"| Ours | 1.20 ± {half:.2f} | 0.60 ± {half / 2:.2f} | 0.30 ± {half / 4:.2f} |" in lines
    assert "| Fixed list | 2.05 ± 0.64 ▼ | 1.02 ± 0.32 ▼ | 0.51 ± 0.16 ▼ |" in lines
    assert "| Fixed list | 0.900 ± 0.000 ▲ | 0.900 ± 0.000 ▲ | 0.900 ± 0.000 ▲ |" in lines
    assert "| teacher, guided |  | 30.00 | 15.00 |" in lines, "by evaluations, not by steps"
    assert "| teacher, no guidance | 50.00 | 25.00 | 12.50 |" in lines
    assert "| Ours | 3 | 100 | 1.50 | 0.72 |" in lines
    assert "| Fixed list | 2 | 1.00 | 2.05 | 1.02 | 0.51 |  | 0.900 |  | 5.20 |" in table.glance(
        found, "updates"
    )
    assert not any("Recall (" in line for line in lines), "what nobody measured has no table"
    assert not any(line.startswith("| Longer") for line in lines)
    for before, line in pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|")


def test_the_findings_have_the_committed_results() -> None:
    comparison = ROOT / "comparison"
    committed = collect(
        design.load_comparison(ROOT / design.PARAMS), comparison / "cells", comparison / "results"
    )
    findings = (ROOT / "docs/findings.md").read_text().splitlines()
    assert all(line in findings for line in table.glance(committed, "updates"))


def test_the_csv_has_a_row_a_method_and_number_of_steps(found: Collected, tmp_path: Path) -> None:
    table.write_csv(found, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 + 2 * 3
    row = next(row for row in rows if (row["table"], row["method"], row["steps"]) == ("updates", "fixed", "2"))
    assert float(row["frechet_distance"]) == pytest.approx(1.025)
    assert float(row["frechet_distance_interval"]) == pytest.approx(12.7062 * 0.05 / 2, rel=1e-4)
    assert (row["seeds"], row["evaluations"], row["forward_equivalents"], row["recall"]) == (
        "2",
        "2",
        "1500000",
        "",
    )


def test_methods_keep_a_look_of_their_own_in_all_figures() -> None:
    """Whatever table they stand in, and none has that of the teacher."""
    comparison = design.load_comparison()
    found = Collected(comparison)
    for theme in (LIGHT, DARK):
        looks = {name: figure.look(found, name, theme) for name in comparison.methods}
        assert len(set(looks.values())) == len(looks) > 20
        assert looks.pop("cdm") == (theme.student, "o")
        assert not {theme.student, theme.teacher} & {colour for colour, _ in looks.values()}
        assert {name: theme.method(name) for name in NAMED} == {name: looks[name] for name in NAMED}


@pytest.mark.parametrize("draw", [figure.draw, figure.draw_changes])
def test_figures_are_drawn_the_same_every_time(found: Collected, draw: Callable[..., bytes]) -> None:
    drawn = draw(found, "updates")
    assert drawn.startswith(b"\x89PNG")
    assert drawn == draw(found, "updates")


@pytest.mark.parametrize(
    ("changes", "reach"),
    [([0.1] * 8 + [0.2, 50.0], 0.2), ([0.3, 0.1, 0.2], 0.3), ([0.0, 0.0], 1.0), ([], 1.0)],
    ids=["one far", "none far", "no change", "none"],
)
def test_one_far_change_does_not_hide_the_others(changes: list[float], reach: float) -> None:
    assert figure._reach(changes) == pytest.approx(reach)


# The pipeline.


@pytest.mark.parametrize("name", ["updates", "cost", "ablations"])
def test_a_cell_depends_on_its_parameters_and_data_and_leaves_one_small_file(name: str) -> None:
    stage = STAGES[name]
    assert stage["matrix"] == {"method": f"${{{name}}}", "seed": "${seeds}"}
    assert stage["cmd"] == f"cd .. && python -m comparison.cell {name} ${{item.method}} ${{item.seed}}"
    assert f"cells/{name}/${{item.method}}.yaml" in stage["deps"]
    assert stage["outs"] == [{f"results/{name}/${{item.method}}-${{item.seed}}.json": {"cache": False}}]
    assert not [dep for dep in stage["deps"] if dep.endswith(".py")]


@pytest.mark.parametrize("name", ["resolve", "table"])
def test_quick_stages_depend_on_the_modules_of_the_comparison_that_they_import(name: str) -> None:
    imported = {path for path in code.imported_files(f"comparison.{name}") if path.startswith("comparison/")}
    listed = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py") and not dep.startswith("../")}
    assert imported == {f"comparison/{dep}" for dep in listed} | {
        "comparison/__init__.py"
    }  # the environment alone


def test_tables_of_the_code_are_those_of_the_pipeline() -> None:
    assert set(design.TABLES) | {"resolve", "pairs", "teacher", "table"} == set(STAGES)
    assert all(stage["cmd"].startswith("cd .. && python -m comparison.") for stage in STAGES.values())


TINY = {
    "seeds": [0],
    "steps": [1, 2],
    "reference": "cdm",
    "updates": ["cdm", "paired"],
    "cost": [],
    "ablations": [],
    "methods": {
        "cdm": {"title": "CDM"},
        "paired": {
            "title": "With a regression",
            "set": {"latents.train_pairs": 4, "distill.losses.regression.weight": 0.25},
        },
    },
}


def write_params(folder: Path, values: dict[str, Any]) -> None:
    with (folder / "comparison/params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)


@pytest.fixture(scope="module")
def repository(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A comparison of two methods, not yet run."""
    folder, home = (tmp_path_factory.mktemp(name) for name in ("comparison", "home"))
    repository = make_repository(folder, home, tiny_sd3, "comparison", "recipes")
    made = ["cells", "results", "figures", "pairs", "runs", "dvc.lock", "table.md", "table.csv"]
    repository.run("rm", "-rf", *(f"comparison/{name}" for name in made))
    write_params(folder, TINY)
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "comparison")
    return repository


CELL = ("python", "-m", "comparison.cell", "updates", "cdm", "0")


@pytest.mark.slow
class TestPipeline:
    """In this order: each goes on where the one before it stopped."""

    def stages_run(self, repository: Repository, *arguments: str) -> list[str]:
        """The stages that `dvc repro` runs in the folder of the comparison."""
        return repository.stages_run("--cd", "comparison", "repro", *arguments)

    def test_a_cell_alone_gives_a_table(self, repository: Repository) -> None:
        assert repository.stages_run("repro", "latents") == ["teacher", "prompts", "latents"]
        ran = self.stages_run(repository, "updates@cdm-0")
        assert ran[-1] == "updates@cdm-0"
        assert set(ran[:-1]) == {"resolve", "pairs"}
        assert self.stages_run(repository, "--single-item", "table") == ["table"]
        page = (repository.folder / "comparison/table.md").read_text()
        assert "| CDM | 1 |" in page
        assert "With a regression" not in page

    def test_the_rest_follows_and_the_repositorys_own_training_does_not(self, repository: Repository) -> None:
        ran = self.stages_run(repository)
        assert ran[-1] == "table"
        assert set(ran[:-1]) == {"teacher", "updates@paired-0"}
        folder = repository.folder
        assert not (folder / "models").exists()
        assert not (folder / "data/samples").exists()
        assert self.stages_run(repository) == []

    def test_the_repository_speaks_of_its_own_stages_alone(self, repository: Repository) -> None:
        names = set(json.loads(repository.dvc("status", "--json")))
        assert names == {"teacher", "distill", "sample", "evaluate"}, (
            "what has not run, and what is always asked"
        )
        assert "comparison" not in repository.dvc("dag", "--dot")

    def test_results_are_small_files_in_git(self, repository: Repository) -> None:
        folder = repository.folder
        changes = repository.run("git", "status", "--porcelain", "--untracked-files=all")
        for name in (
            "dvc.lock",
            "results/updates/cdm-0.json",
            "figures/updates.png",
            "cells/updates/paired.yaml",
        ):
            assert f"comparison/{name}" in changes
        assert "comparison/runs" not in changes
        assert "comparison/pairs" not in changes
        assert not list((folder / "comparison/runs").glob("*/*/samples"))
        result = Result.read(folder / "comparison/results/updates/paired-0.json")
        assert {steps: row["evaluations"] for steps, row in result.rows.items()} == {"steps1": 1, "steps2": 2}
        teacher = TeacherResult.read(folder / "comparison/results/teacher.json")
        guided = {steps: row["evaluations"] for steps, row in teacher.guided.items()}
        assert guided == {"steps1": 2, "steps2": 4, "steps3": 6}, "its full length is 3 steps here"
        assert {steps: row["evaluations"] for steps, row in teacher.unguided.items()} == {
            "steps1": 1,
            "steps2": 2,
        }

    def test_a_cell_has_the_figures_of_the_pipeline_at_the_same_parameters(
        self, repository: Repository
    ) -> None:
        """The core calls are the stages' own: the reference at seed 0 is the repository's student."""
        assert repository.stages_run("repro") == ["teacher", "distill", "sample", "evaluate"]
        quality = json.loads((repository.folder / "metrics/quality.json").read_text())
        cell = Result.read(repository.folder / "comparison/results/updates/cdm-0.json")
        assert cell.rows == quality["student"]

    def test_a_change_of_one_method_reruns_its_cells(self, repository: Repository) -> None:
        values = YAML(typ="safe").load(repository.folder / "comparison/params.yaml")
        values["methods"]["paired"]["set"]["distill.ema"] = 0.5
        write_params(repository.folder, values)
        assert self.stages_run(repository) == ["resolve", "updates@paired-0", "table"]

    def test_a_forced_cell_keeps_a_student_that_would_be_the_same(self, repository: Repository) -> None:
        path = repository.folder / "comparison/results/updates/cdm-0.json"
        before = path.read_bytes()
        path.unlink()
        assert "trained already" in repository.run(*CELL)
        assert path.read_bytes() == before

    def test_an_interrupted_cell_is_taken_up_again(self, repository: Repository) -> None:
        """Stopped in its training: the next run has the result of one that was not stopped."""
        folder = repository.folder / "comparison"
        expected = (folder / "results/updates/cdm-0.json").read_bytes()
        repository.run("rm", "-rf", "comparison/runs/updates/cdm-0", "comparison/results/updates/cdm-0.json")
        process = subprocess.Popen(CELL, cwd=repository.folder, env=repository.environment)
        wait_for(lambda: bool(list((folder / "runs/updates/cdm-0").glob("checkpoints/*"))))
        process.send_signal(signal.SIGINT)
        process.wait(timeout=600)
        repository.run(*CELL)
        assert (folder / "results/updates/cdm-0.json").read_bytes() == expected


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
