"""Commands of scorers: variables, `~`, and the files that they consist of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cdm.errors import CdmError
from cdm.system.commands import Command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, beside which there are a home and a folder of programs."""
    for name in ("here", "home", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("WEIGHTS", "/weights of mine")
    return tmp_path / "here"


def write(path: Path, text: str = "", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def test_a_command_is_what_a_shell_would_make_of_it(here: Path) -> None:
    command = Command.parse(
        "CUDA_VISIBLE_DEVICES=1 CONFIG=~/a.yaml ~/env/bin/python 'my score.py' --w=~/w $WEIGHTS/${WEIGHTS}x a=b $ ~x"
    )
    home = here.parent / "home"
    assert command.environment == {"CUDA_VISIBLE_DEVICES": "1", "CONFIG": f"{home}/a.yaml"}
    weights = "/weights of mine"
    assert command.arguments == [
        f"{home}/env/bin/python",
        "my score.py",
        f"--w={home}/w",
        f"{weights}/{weights}x",
        "a=b",
        "$",
        "~x",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("python 'score.py", "No closing quotation"),
        ("A=1 B=2", "A=1 B=2: names no program"),
        ("   ", "names no program"),
        ("python $NOT_SET_AT_ALL/x.py", "the environment variable NOT_SET_AT_ALL is not set"),
        ("A=${NOT_SET_AT_ALL} python", "the environment variable NOT_SET_AT_ALL is not set"),
    ],
)
def test_what_is_no_command_is_a_line(here: Path, text: str, says: str) -> None:
    with pytest.raises(CdmError) as error:
        Command.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_program_is_found_where_its_own_path_says(here: Path) -> None:
    write(here.parent / "other" / "score", "#!/bin/sh", 0o755)
    assert Command.parse("score").program is None
    assert Command.parse(f"PATH={here.parent}/other score").program == here.parent / "other" / "score"


def test_scripts_that_are_not_there_are_named(here: Path) -> None:
    write(here / "there.py")
    write(here.parent / "home" / "there.py")
    command = Command.parse(f"{sys.executable} there.py ~/there.py gone.py ~/gone.py --x {'long' * 100}.py")
    assert command.missing_scripts() == ["gone.py", f"{here.parent}/home/gone.py", f"{'long' * 100}.py"]


FILES = {
    "score.py": "a script",
    "../bin/scored": "a script on the path",
    "../home/mine.sh": "a script at home",
    "sub/program": "a program of this folder",
    "settings.json": "an argument",
    "a.yaml": "the value of an option",
    "b.yaml": "the value of a variable",
    "tools/judge.py": "a module",
    "package/__main__.py": "the module of a package",
    "helper.py": "imported by a script",
    "deep.py": "imported by what a script imports",
    "tools/near.py": "imported by a module from beside it",
}


def names(command: str) -> list[str]:
    return sorted(Command.parse(command).files())


def test_a_command_consists_of_its_own_files(here: Path) -> None:
    for name in FILES:
        write(here / name, "#!/bin/sh\n", 0o755)
    write(here / "score.py", "import json, sys\nfrom helper import x\nimport nowhere")
    write(here / "helper.py", "def f():\n    import deep\n    from . import score")
    write(here / "tools/judge.py", "from .near import x\nfrom . import near")
    write(here / "package/__main__.py", "not Python at all (")
    write(here.parent / "bin/python", "\x7fELF", 0o755)
    write(here / "unused.py")
    scripts = ["deep.py", "helper.py", "score.py"]
    assert names("python score.py --batch 8") == scripts
    assert names("scored --x settings.json") == ["scored", "settings.json"]
    assert names("~/mine.sh") == ["~/mine.sh"]
    assert names("sub/program") == ["sub/program"]
    assert names("B=b.yaml python --config=a.yaml -c 1") == ["a.yaml", "b.yaml"]
    assert names("python -m tools.judge") == ["tools/judge.py", "tools/near.py"]
    assert names("python -m package") == ["package/__main__.py"]
    assert names("python -m nowhere.at.all --folder sub") == []
    assert names(f"{here.parent}/bin/python {here}/score.py") == sorted(f"{here}/{name}" for name in scripts)
    assert names("python ./score.py") == sorted(f"./{name}" for name in scripts)
    assert names("no-such-program") == []


def test_what_a_command_consists_of_is_hashed_with_the_variables_in_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "score.py")
    monkeypatch.setenv("MODEL", "large")
    command = "A=$MODEL python score.py ${MODEL} $WEIGHTS"

    def found() -> dict[str, str]:
        return Command.parse(command).hashes(lambda path: f"hash of {path.name}")

    before = found()
    assert list(before) == ["score.py", "$MODEL"], "a path says where a thing is, and not what it is"
    assert before["score.py"] == "hash of score.py"
    assert "large" not in before["$MODEL"], "it may be a secret"
    monkeypatch.setenv("WEIGHTS", "/elsewhere")
    assert found() == before
    monkeypatch.setenv("MODEL", "small")
    assert found() != before
