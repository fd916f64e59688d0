"""`cdm scorer check` and `cdm scorer list`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from cdm.errors import CdmError
from cdm.evaluation import scorer_check
from cdm.params import ScorerProcess
from cdm.system import programs
from tests.sample_sets import ROOT
from tests.test_cli import Command, command  # noqa: F401 - a fixture
from tests.test_scorers import ADAPTERS, DOUBLE, WITH_A_CHILD, scorer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts in the current folder, which has no params file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorers").mkdir()
    return tmp_path / "scorers"


def write(folder: Path, code: str, name: str = "mine") -> None:
    head = '"""Mine, a test.\n\nInstall: pip install\nmine\n"""\nfrom protocol import parser, serve\n'
    (folder / "protocol.py").write_text((ROOT / "scorers/protocol.py").read_text())
    (folder / f"{name}.py").write_text(head + code)


def test_it_prints_scores_and_seconds(command: Command, folder: Path) -> None:  # noqa: F811
    """The two pictures are a red circle on white and a blue square on grey, and their prompts say so."""
    write(
        folder,
        """
options = parser("mine")
options.add_argument("--add", type=int)
arguments = options.parse_args()
def score(images, folder):
    from PIL import Image
    shown = [Image.open(each["path"]) for each in images]
    assert [picture.size for picture in shown] == [(512, 512)] * 2
    assert [each["prompt"].split()[1] for each in images] == ["red", "blue"]
    middles = [picture.getpixel((256, 256)) for picture in shown]
    assert [max(range(3), key=middle.__getitem__) for middle in middles] == [0, 2]
    assert shown[0].getpixel((0, 0)) == (255, 255, 255)
    return {"scores": {"score": [arguments.add + each["id"] for each in images]}, "summary": {"all": 0.25}}
serve(arguments, score)
""",
    )
    result = command("scorer", "check", "mine", "--", "--add", "7")
    assert result.code == 0, result.err
    assert re.fullmatch(r"mine: score 7 and 8; all 0\.25 of both; \d+\.\d s\n", result.out)


def test_the_prompts_of_a_list(command: Command, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    write(
        folder,
        "serve(parser('').parse_args(), lambda images, folder:"
        " {'scores': {'score': [len(each['prompt']) for each in images]}})",
    )
    (tmp_path / "list.txt").write_text("a\nbcd\nefghi\n")
    assert "score 1 and 3;" in command("scorer", "check", "mine", "--prompts", "list.txt").out


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import a_package_of_mine.parts",
            f"the environment of {sys.executable} lacks a_package_of_mine: pip in",
        ),
        ("raise SystemExit('out of memory')", "scorer mine: check: 2 pictures: exit code 1: out of memory"),
        ("pass", "scorer mine: wrote no answer"),
        (
            "serve(parser('').parse_args(), lambda *_: {'scores': {'score': [1]}})",
            "expected 2 finite numbers",
        ),
    ],
)
def test_what_is_wrong_is_one_line(command: Command, folder: Path, code: str, says: str) -> None:  # noqa: F811
    write(folder, code)
    result = command("scorer", "check", "mine")
    assert result.code == 1
    assert says in result.err.splitlines()[-1]


def test_one_of_the_params_file(tmp_path: Path) -> None:
    known = [scorer(tmp_path, DOUBLE)]
    assert scorer_check.find_scorer("double", known, tmp_path, sys.executable) is known[0]
    checked = scorer_check.check_scorer(known[0], scorer_check.PROMPTS, minutes=5, limit="--minutes")
    assert checked.answer.scores == {
        "score": [255, 150],
        "length": [len(text) for text in scorer_check.PROMPTS],
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no-such-program x", "no-such-program: no such program"),
        (f"{sys.executable} x.py", "x.py: no such file"),
    ],
)
def test_what_is_not_there_is_one_line(text: str, says: str) -> None:
    with pytest.raises(CdmError, match=f"^scorer a: {says}"):
        scorer_check.check_scorer(
            ScorerProcess(name="a", command=text), scorer_check.PROMPTS, minutes=5, limit="--minutes"
        )


def test_one_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_ended", lambda *_: False)
    with pytest.raises(CdmError, match=r"stopped after 5 minutes \(--minutes\): it said nothing$"):
        scorer_check.check_scorer(
            scorer(tmp_path, WITH_A_CHILD), scorer_check.PROMPTS, minutes=5, limit="--minutes"
        )


def test_names_are_listed(command: Command, folder: Path) -> None:  # noqa: F811
    assert "no scorers there" in command("scorer", "list").error
    write(folder, "")
    assert command("scorer", "list").out == "mine  scorers/mine.py: Mine, a test.\n"
    assert "(known: mine)" in command("scorer", "check", "yours").error


def test_the_page_has_the_install_line_of_every_script() -> None:
    page = (ROOT / "docs/scorers.md").read_text()
    scripts = scorer_check.find_scripts(ROOT / "scorers")
    assert [script.path for script in scripts] == ADAPTERS
    for script in scripts:
        assert script.install, script.name
        assert f"(`scorers/{script.name}.py`):\n\n```text\n{script.install}\n```" in page
