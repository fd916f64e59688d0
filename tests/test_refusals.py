"""Whatever is wrong with what a command is given, it ends in lines that say what, and never in a traceback."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import refusals_world as world
from tests.launching import python
from tests.refusals import Case, call, call_process, run
from tests.refusals_table import CASES, CHECK, DEEP, SAMPLE, params, write


@pytest.fixture(scope="module")
def made(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which the pipeline has run: read only."""
    return world.build(tmp_path_factory.mktemp("refusals") / "world", tiny_sd3, call)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return world.copy(made, tmp_path / "copy")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case.slow else (), id=case.name) for case in CASES],
)
def test_a_bad_input_is_refused_in_lines(case: Case, folder: Path) -> None:
    try:
        assert run(case, folder).problem(case) == ""
    finally:
        world.remove(folder)


def test_no_two_cases_have_the_same_name() -> None:
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


IN_PROCESSES = [
    Case("check, nested brackets", CHECK, "nested too deeply", write("params.yaml", DEEP)),
    Case("check, an unknown file", ("cdm", "params", "check", "nothing.yaml"), "nothing.yaml: cannot be read"),
    Case(
        "stage, too many neighbours",
        ("stages.teacher",),
        "evaluate.neighbours 500",
        params(evaluate__neighbours=500),
    ),
    Case("stage, a file in the way", ("stages.prompts",), "plots: a file is in the way", write("plots", "")),
    Case("cdm sample, a seed too large", (*SAMPLE, "--seed", str(2**64)), "--seed is 18446744073709551616"),
    Case("cdm, an unknown command", ("cdm", "smaple"), "smaple", code=2),
]


@pytest.mark.parametrize("case", IN_PROCESSES, ids=lambda case: case.name)
def test_a_process_of_its_own_says_the_same(case: Case, folder: Path) -> None:
    case.prepare(folder)
    assert call_process(python(), case.command, folder).problem(case) == ""


def test_without_the_help_of_the_tests_it_says_the_same(folder: Path) -> None:
    case = IN_PROCESSES[0]
    case.prepare(folder)
    assert call_process(Path(sys.executable), case.command, folder).problem(case) == ""
