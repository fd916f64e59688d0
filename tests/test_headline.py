"""What DVC's tables and plots show of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cdm.errors import CdmError
from cdm.experiments.headline import as_csv, make_headline, training_seconds, write_headline
from cdm.params import load
from cdm.planning.forwards import forwards_of_round, forwards_of_training

ROOT = Path(__file__).parent.parent


def row(evaluations: int, **figures: float) -> dict[str, float]:
    return {
        "evaluations": evaluations,
        "frechet_distance": 0.123456,
        "style_distance": 2.0,
        **figures,
        "count": 8,
    }


def figures(real: bool = True, **more: float) -> dict[str, Any]:
    """The student at 1 and 10 steps, the teacher at 4 and 50; in a file's order, which is not that of the steps."""
    found: dict[str, Any] = {
        "student": {"steps10": row(10, **more), "steps1": row(1, **more)},
        "teacher": {"steps4": row(8, **more), "steps50": row(100, **more)},
    }
    return found | ({"real": {"halves": row(0)}} if real else {})


def headline(found: dict[str, Any]) -> dict[str, float]:
    return make_headline(found, seconds=1234.56, forwards=835_249.7)


def test_the_headline_has_a_dozen_numbers_that_read_by_themselves() -> None:
    assert headline(figures(attribute_accuracy=0.917969)) == {
        "FD@1": 0.1235, "FD@10": 0.1235, "right@1": 0.918, "right@10": 0.918,
        "teacher FD@50": 0.1235, "teacher right@50": 0.918, "train seconds": 1235, "train forwards": 835_200,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("real", "more", "names"),
    [
        (True, {}, ["pixel distance@1", "pixel distance@10", "teacher pixel distance@50"]),
        (False, {}, ["pixels to teacher@1", "pixels to teacher@10"]),
        (False, {"attribute_accuracy": 0.5}, [
            "FD to teacher@1", "FD to teacher@10", "right@1", "right@10", "teacher right@50",
        ]),
        (True, {"fid": 1.0, "clip_score": 30.0}, [
            "fid@1", "fid@10", "CLIPScore@1", "CLIPScore@10", "pixel distance@1", "pixel distance@10",
            "teacher fid@50", "teacher CLIPScore@50", "teacher pixel distance@50",
        ]),
    ],
)  # fmt: skip
def test_a_distance_is_called_by_what_it_is_of(real: bool, more: dict[str, float], names: list[str]) -> None:
    """Without a judge it is one of pixels; without real pictures it is to the teacher, whose own would be 0."""
    assert list(headline(figures(real, **more)))[:-2] == names


def test_a_headline_stays_short_whatever_is_measured() -> None:
    many = {f"scorer_{i}": float(i) for i in range(9)}
    kinds = {name.split("@")[0] for name in headline(figures(**many)) if "@" in name and "teacher" not in name}
    assert kinds == {"scorer_0", "scorer_1", "scorer_2"}


def test_the_curves_are_a_table_with_a_row_a_sample_set() -> None:
    found = figures()
    del found["teacher"]["steps4"]["style_distance"]
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [(each["model"], each["steps"], each["evaluations"]) for each in rows] == [
        ("student", "1", "1"), ("student", "10", "10"), ("teacher", "4", "8"), ("teacher", "50", "100"),
    ]  # fmt: skip
    assert rows[2]["style_distance"] == "", "a figure that is not there is blank"
    assert rows[0]["attribute_accuracy"] == "", "a plot's column is there in any case"
    assert rows[0]["frechet_distance"] == "0.123456"


def test_both_files_are_written_from_the_figures(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(json.dumps(figures()))
    paths = tmp_path / "quality.json", tmp_path / "new/headline.json", tmp_path / "new/quality.csv"
    written = write_headline(*paths, seconds=1.0, forwards=2.0)
    assert json.loads(paths[1].read_text()) == written
    assert paths[2].read_text() == as_csv(figures())


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_times_that_are_not_there_name_the_stage(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "timing.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CdmError, match=r"timing\.json: missing or damaged: run the stage `distill`"):
        training_seconds(path)
    path.write_text('{"seconds": 12.5}')
    assert training_seconds(path) == 12.5


def test_the_forwards_of_a_training_are_those_of_its_rounds() -> None:
    """One by one, of the rounds before the student's first update and of those with it."""
    params = load(ROOT / "params.yaml")
    distill, schedule = params.distill, params.schedule
    expected = sum(
        distill.batch_size
        * forwards_of_round(distill, schedule, 1.0, learns=iteration >= distill.fake_only).equivalents
        for iteration in range(0, distill.iterations, distill.student_every)
    )
    assert forwards_of_training(distill, schedule, 1.0).equivalents == pytest.approx(expected)
