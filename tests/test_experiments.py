"""Comparing experiments: what is found in Git, which differences count, tables, the page and its pictures."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cdm.cli import main
from cdm.errors import CdmError
from cdm.evaluation.theme import DARK, LIGHT
from cdm.experiments.changes import Change, brief, changes
from cdm.experiments.comparison import Compared, compare
from cdm.experiments.curves import colour
from cdm.experiments.figures import Difference, Figure, Relation, read, relate
from cdm.experiments.page import render
from cdm.experiments.pictures import Pictures, Place, pictures_of, prompt_of, shown
from cdm.experiments.revisions import Revision, find
from cdm.experiments.tables import WIDTH, brief_table, full_table
from cdm.measures import JUDGED, student_t
from tests.experiment_sets import BASIS, PARAMS, Project, quality

LONGER = PARAMS.replace("max_len: 6", "max_len: 8")
DISTANCE, RIGHT = JUDGED["frechet_distance"], JUDGED["attribute_accuracy"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.commit(quality())
    return project


def test_without_names_it_is_the_commit_with_its_experiments_and_the_workspace(project: Project) -> None:
    first = project.experiment("one", quality(), LONGER)
    assert [(each.name, each.commit == first) for each in find([], project.folder)] == [
        ("main", False), ("one", True), ("workspace", False),
    ]  # fmt: skip
    project.commit(quality(0.9))
    assert [each.name for each in find([], project.folder)] == ["main", "workspace"], "it is of another commit"


def test_names_are_experiments_revisions_or_the_workspace(project: Project) -> None:
    head = project.git("rev-parse", "HEAD")
    old = project.experiment("one", quality(), LONGER)
    project.commit(quality(0.9))
    assert [(each.name, each.commit) for each in find(["HEAD~1", "one", "workspace", "one"], project.folder)] == [
        ("HEAD~1", head), ("one", old), ("workspace", None),
    ]  # fmt: skip
    assert [each.name for each in find(["one"], project.folder)] == ["main", "one"], "a single one, with HEAD"
    assert [each.name for each in find(["HEAD"], project.folder)] == ["main"], "and that once"


def test_an_experiment_of_the_commit_goes_before_another_of_its_name(project: Project) -> None:
    project.experiment("one", quality(), LONGER)
    project.commit(quality(0.9))
    project.experiment("one", quality(0.7), LONGER)
    own = find(["one"], project.folder)[1]
    assert read(own).quality["student"]["steps1"]["frechet_distance"] == 0.7  # type: ignore[union-attr]
    project.commit(quality(0.8))
    with pytest.raises(
        CdmError, match=r"one: experiments of several commits are called so: give [0-9a-f]{7} or"
    ):
        find(["one"], project.folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "nonsense: no experiment and no revision of Git; `dvc exp list --all-commits` names"),
        ("--help", "--help: no experiment and no revision of Git"),
        ("empty", "empty: has no metrics/quality.json: let `dvc repro` run to its end there"),
        ("torn", "torn: its metrics/quality.json is damaged"),
    ],
)
def test_a_name_that_cannot_be_compared_is_a_line(project: Project, name: str, message: str) -> None:
    project.git("branch", "good")
    project.git("rm", "--quiet", "-r", "metrics")
    project.git("commit", "--quiet", "--message", "none")
    project.git("branch", "empty")
    (project.folder / "metrics").mkdir()
    (project.folder / "metrics/quality.json").write_text('{"student": {}')
    project.git("add", ".")
    project.git("commit", "--quiet", "--message", "torn")
    project.git("branch", "torn")
    with pytest.raises(CdmError) as caught:
        compare(["good", name], project.folder)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_outside_of_git_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CdmError, match="in no Git repository, or in one without a commit"):
        compare([], tmp_path)


def test_what_is_asked_for_by_nobody_is_left_out_with_a_reason(project: Project) -> None:
    project.experiment("one", quality(0.8), LONGER)
    project.experiment("bare", None, PARAMS)  # with the commit's results
    project.git("rm", "--quiet", "--cached", "-r", "metrics")
    project.git("commit", "--quiet", "--message", "none")
    head = project.git("rev-parse", "HEAD")
    project.git("reset", "--quiet", "--hard", "HEAD~1")
    base = project.git("rev-parse", "HEAD")
    project.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/none", head)
    found = compare([], project.folder)
    assert [each.name for each in found.entries] == ["main", "one", "bare"]
    assert sorted(found.skipped) == ["none: no results yet", "workspace: the same as main"]
    project.write(quality(0.5))
    assert [each.name for each in compare([], project.folder).entries][-1] == "workspace"


def test_changes_are_parameters_in_the_files_order_and_then_code(project: Project) -> None:
    params = LONGER.replace("[1.0, 0.5]", "[1.0]").replace("    cdm:\n      weight: 0.25\n", "  ema: 0.9\n")
    project.experiment("one", quality(), params, code="2")
    baseline, one = find(["main", "one"], project.folder)
    assert changes(one, baseline) == [
        Change("schedule.max_len", "6", "8"),
        Change("schedule.sigmas", "[1.0, 0.5]", "[1.0]"),
        Change("distill.ema", "(none)", "0.9"),
        Change("distill.losses.cdm.weight", "0.25", "(none)"),
        Change("cdm/losses.py"),
    ]
    assert changes(baseline, baseline) == []


def test_keys_are_as_short_as_they_can_be() -> None:
    keys = [
        "distill.losses.ca.weight",
        "distill.losses.dm.weight",
        "schedule.max_len",
        "seed",
        "distill.ca.weight",
    ]
    assert [brief(key, keys) for key in keys] == [
        "losses.ca.weight", "dm.weight", "max_len", "seed", "distill.ca.weight",
    ]  # fmt: skip


def test_students_t_is_that_of_the_tables() -> None:
    table = {3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 30: 2.042, math.inf: 1.960}
    assert {freedom: student_t(freedom) for freedom in table} == pytest.approx(table, rel=0.01)


def test_paired_figures_differ_by_less_than_their_intervals() -> None:
    """The replicates of both go up and down together: their difference is known far better than they are."""
    ours, theirs = Figure(1.03, (1.2, 0.8, 1.1, 0.9, 1.0)), Figure(1.0, (1.17, 0.77, 1.07, 0.87, 0.97))
    paired, apart = Relation(True, True), Relation(True, False)
    assert ours.reach == pytest.approx(student_t(4) * 0.1581, rel=1e-3)
    assert paired.difference(ours, theirs).reach == pytest.approx(0, abs=1e-9)
    assert apart.difference(ours, theirs).reach == pytest.approx(math.hypot(ours.reach, theirs.reach or 0))
    assert paired.difference(ours, theirs).mark(DISTANCE) == "worse"
    assert paired.difference(ours, theirs).mark(RIGHT) == "better"
    assert apart.difference(ours, theirs).mark(DISTANCE) == ""
    assert Relation(False, False).difference(ours, theirs) == Difference(pytest.approx(0.03), None)
    assert Relation(True, True).difference(ours, Figure(1.0)).mark(DISTANCE) == "", "no error, no mark"


def test_a_figure_that_is_best_in_the_middle_is_only_called_another() -> None:
    assert Difference(0.5, 0.1).mark(JUDGED["diversity"]) == "other"


def test_intervals_over_prompts_have_no_few_blocks() -> None:
    replicates = (1.0, 2.0, 3.0)
    assert Figure(2.0, replicates, "prompts").reach == pytest.approx(1.96, rel=1e-4)
    assert Figure(2.0, replicates, "noise").reach > 3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changed", "comparable", "paired", "remark"),
    [
        ({}, True, True, None),
        ({"student": "another"}, True, True, None),
        ({"guidance_scale": 3.0}, True, True, None),
        ({"seed": 1}, True, False, "seed 1 and not 0: not the same noise, and another training all over"),
        ({"teacher": "x"}, True, False, "another teacher"),
        ({"prompts": "x"}, False, False, "other evaluation prompts: the figures are not of the same task"),
        ({"per_prompt": 4}, False, False, "another number of samples: the figures are not of the same task"),
        ({"judge": None}, False, False, "another judge: the figures are not of the same task"),
        ({"real": "x"}, False, False, "other real pictures: the figures are not of the same task"),
        (
            {"models": {"CLIP": "x"}},
            False,
            False,
            "other models of measures: the figures are not of the same task",
        ),
    ],
)
def test_what_is_not_the_same_is_said_and_kept_from_the_marks(
    project: Project, changed: dict[str, object], comparable: bool, paired: bool, remark: str | None
) -> None:
    project.write(quality(0.5, basis=BASIS | changed))
    ours, theirs = read(Revision("workspace", None, project.folder)), read(find(["main"], project.folder)[0])
    assert ours is not None
    assert theirs is not None
    found = relate(ours, theirs)
    assert (found.comparable, found.paired) == (comparable, paired)
    assert found.remarks == (() if remark is None else (remark,))
    marks = {
        found.difference(one, other).mark(DISTANCE)
        for one, other in [
            (ours.figure("student", 1, "frechet_distance"), theirs.figure("student", 1, "frechet_distance"))
        ]
    }
    assert marks == ({"better"} if comparable else {""})


def test_where_the_teacher_is_the_reference_another_guidance_is_another_task(project: Project) -> None:
    free = BASIS | {"real": None}
    project.commit(quality(basis=free))
    project.write(quality(basis=free | {"guidance_scale": 3.0}))
    found = compare(["main", "workspace"], project.folder)
    assert not found.others[0].relation.comparable
    assert "the reference is the teacher's samples" in found.others[0].relation.remarks[0]


def test_results_of_before_errors_were_kept_are_shown_without_marks(project: Project) -> None:
    older = {name: value for name, value in quality().items() if name in ("student", "teacher", "real")}
    project.commit(None)
    (project.folder / "metrics/quality.json").write_text(json.dumps(older))
    (project.folder / "metrics/headline.json").unlink()
    found = compare(["main", "workspace"], project.folder)
    assert found.others[0].relation.remarks == ("workspace was measured before errors were kept: run it again",)
    assert "workspace" in full_table(found)
    assert "workspace" in brief_table(found)


@pytest.mark.parametrize(("count", "last"), [(4, "03.py"), (5, "2 more files"), (48, "45 more files")])
def test_of_many_changed_files_some_are_named(tmp_path: Path, count: int, last: str) -> None:
    """Between two commits nearly all of the code may differ; the parameters are what one looks for."""
    revisions = []
    for name in ("before", "after"):
        deps = [{"path": f"{index:02}.py", "md5": name} for index in range(count)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "dvc.lock").write_text(json.dumps({"stages": {"distill": {"deps": deps}}}))
        revisions.append(Revision(name, None, tmp_path / name))
    keys = [change.key for change in changes(revisions[1], revisions[0])]
    assert keys[:3] == ["00.py", "01.py", "02.py"]
    assert keys[3:] == [last]


@pytest.fixture
def compared(project: Project) -> Compared:
    """Three experiments: a little better with certainty, with another seed, and a code change of no effect."""
    project.experiment(
        "longer-and-stronger", quality(0.97), LONGER.replace("0.75", "1.1").replace("0.25", "0.5")
    )
    project.experiment(
        "seed-1", quality(1.01, 0.002, BASIS | {"seed": 1}), PARAMS.replace("seed: 0", "seed: 1")
    )
    project.experiment("code", quality(), code="2")
    return compare([], project.folder)


def test_the_table_says_what_was_changed_first_and_what_holds(compared: Compared) -> None:
    text = full_table(compared)
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert text.index("schedule.max_len           6 → 8") < text.index("Fréchet distance ↓")
    start = lines.index(next(line for line in lines if line.startswith("Fréchet distance")))
    block = [line.split() for line in lines[start : start + 6]]
    assert block[1] == ["main", "1.000", "±", "0.047", "0.250", "±", "0.047"]
    assert block[2] == ["longer-and-stronger", "0.970", "±", "0.047", "+", "0.242", "±", "0.047", "+"]
    assert block[3] == ["seed-1", "1.010", "±", "0.045", "0.253", "±", "0.045"]
    assert block[5] == ["teacher", "at", "50", "steps:", "0.040", "±", "0.047"]
    assert "  code                      cdm/losses.py (code)" in lines
    assert "seed-1: seed 1 and not 0: not the same noise, and another training all over" in text
    assert "workspace: the same as main" in text
    assert "1,234 " in text
    assert "835,200" in text


def test_without_a_judge_a_distance_is_called_one_of_pixels(project: Project) -> None:
    figures = quality(basis=BASIS | {"judge": None})
    for row in (*figures["student"].values(), *figures["teacher"].values()):
        del row["attribute_accuracy"]
    project.commit(figures)
    project.experiment("longer", figures, LONGER)
    found = compare([], project.folder)
    text, brief = full_table(found), brief_table(found)
    page = render(found, {each.name: Pictures(problem="none") for each in found.entries})
    for output in (text, page):
        assert "Distance of pixel statistics" in output
        assert "Distance of pixel detail" in output
        assert not re.search("Fréchet|Style distance", output)
    assert "Precision, pixels" in page
    assert "pixel distance@4" in brief
    assert "FD@4" not in brief


def test_the_brief_table_has_a_row_an_experiment_with_what_was_changed_first(compared: Compared) -> None:
    lines = brief_table(compared).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].split() == ["experiment", "changed", "FD@1", "FD@4", "right@1", "right@4", "seconds"]
    assert lines[1].split() == ["main", "(baseline)", "1", "0.25", "0.9", "0.9", "1234"]
    assert lines[2].split()[:4] == ["longer-and-stronger", "max_len=8,", "ca.scale=1.1,", "cdm.weight=0.5"]
    assert lines[4].split()[:2] == ["code", "losses.py"]


def test_many_columns_leave_room_for_what_was_changed(project: Project) -> None:
    many = quality()
    row, replicates = many["student"]["steps1"], many["replicates"]["noise"]["student"]["steps1"]
    for steps in range(1, 17):
        many["student"][f"steps{steps}"], many["replicates"]["noise"]["student"][f"steps{steps}"] = (
            row,
            replicates,
        )
    project.commit(many)
    project.experiment("one", many, LONGER)
    lines = brief_table(compare([], project.folder)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "max_len=8" in lines[2]


def test_neither_torch_nor_dvc_is_needed_for_the_tables() -> None:
    """By what the modules import when they are: the page alone needs more."""
    import ast

    for name in ("revisions", "figures", "changes", "comparison", "tables", "headline", "baseline", "pictures"):
        tree = ast.parse(Path(sys.modules["cdm.experiments"].__path__[0], f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith(("torch", "dvc", "cdm.evaluation", "cdm.data")), name


def png(prompt: str, size: int = 32) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("prompt", prompt)
    Image.new("RGB", (size, size), "red").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def drawn(prompt: str = "a red three") -> Pictures:
    """Pictures of prompt 5: the teacher's at 50 steps, the student's at 1 and 4."""
    places = [Place(5, "teacher", 50), Place(5, "student", 1), Place(5, "student", 4)]
    return Pictures({place: png(prompt) for place in places})


def test_the_page_is_whole_and_has_everything(compared: Compared) -> None:
    pictures = {each.name: drawn() for each in compared.entries}
    pictures["seed-1"] = Pictures(problem="no pictures: <gone>")
    pictures["code"] = drawn("another prompt")
    page = render(compared, pictures)
    assert "http" not in page
    assert "<script" not in page
    assert "&lt;gone&gt;" in page
    for name in ("main", "longer-and-stronger", "seed-1", "code", "schedule.max_len", "cdm/losses.py"):
        assert name in page
    assert page.count("<picture>") == 3, "a figure for each of the main measures"
    assert page.count('<mark class="better">') > 1
    # the teacher once, and two students of two numbers of steps; those of another prompt are none
    assert page.count('alt="teacher, 50 steps: a red three"') == 1
    assert page.count(': a red three"') == 1 + 2 * 2
    assert page.count('<div class="none">') == 2 * 2
    assert "Not all experiments drew from the same noise" in page
    assert page.count("@media (prefers-color-scheme: dark)") == 1


def test_without_pictures_the_page_has_the_rest(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdm.experiments.page.curves", lambda *_: (b"\x89PNG", b"\x89PNG"))
    page = render(compared, {each.name: Pictures(problem="none") for each in compared.entries})
    assert "<h2>The same prompts" not in page
    assert "<h2>Figures" in page


def test_no_experiment_has_the_colour_of_the_teacher() -> None:
    for theme in (LIGHT, DARK):
        found = [colour(index, theme) for index in range(5)]
        assert found[0] == theme.student
        assert len({*found, theme.teacher}) == 6


def test_pictures_of_the_working_tree_are_those_of_its_figures(project: Project) -> None:
    folder = project.folder / "data/samples"
    results = read(Revision("workspace", None, project.folder))
    assert results is not None
    assert "is not there" in pictures_of(results).problem
    (folder / "pictures").mkdir(parents=True)
    (folder / "student/steps1").mkdir(parents=True)
    (folder / "pictures/005-student-steps4.png").write_bytes(png("a blue one"))
    (folder / "pictures/notes.txt").touch()
    for student, kept in (("s", True), ("x", False)):
        (folder / "student/steps1/manifest.json").write_text(json.dumps({"metadata": {"model": student}}))
        found = pictures_of(results)
        assert bool(found.png) == kept
        assert ("of another student" in found.problem) != kept


def test_large_pictures_are_made_small_for_the_page() -> None:
    small, large = png("a", 64), png("b", 1024)
    assert shown(small) == small
    with Image.open(io.BytesIO(shown(large))) as image:
        assert (image.format, image.size) == ("JPEG", (384, 384))
    assert prompt_of(large) == "b"


@pytest.mark.slow
def test_an_experiment_whose_samples_no_cache_has_says_so_in_a_line(project: Project) -> None:
    """DVC itself is asked, in a project without a cache."""
    (project.folder / ".dvc").mkdir()
    (project.folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    project.git("add", ".")
    outs = "stages:\n  sample:\n    cmd: none\n    outs: [data/samples]\n"
    (project.folder / "dvc.yaml").write_text(outs)
    lock = {"sample": {"cmd": "none", "outs": [{"path": "data/samples", "md5": f"{'0' * 32}.dir"}]}}
    (project.folder / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": lock}))
    project.git("add", ".")
    project.git("commit", "--quiet", "--message", "dvc")
    results = read(find(["HEAD"], project.folder)[0])
    assert results is not None
    found = pictures_of(results)
    assert found.png == {}
    assert found.problem.startswith("no pictures: DVC's cache lacks data/samples")


def test_the_command_prints_the_tables_and_writes_the_page(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(quality(0.5), LONGER)
    monkeypatch.chdir(project.folder)
    from cdm.experiments import page

    monkeypatch.setattr(page, "pictures_of", lambda results: Pictures(problem="none"))
    monkeypatch.setattr(page, "curves", lambda *_: (b"\x89PNG", b"\x89PNG"))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cdm", "compare", *arguments])
        with pytest.raises(SystemExit):
            main()
        caught = capsys.readouterr()
        return caught.out + caught.err

    assert "compare.html: curves, tables and pictures" in run("workspace")
    assert (project.folder / "compare.html").exists()
    assert run("--brief", "--out", "never.html").startswith("experiment")
    assert not (project.folder / "never.html").exists()
    assert run("nonsense").startswith("error: nonsense: no experiment")
