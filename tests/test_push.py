"""Pushing a student to a hub: against a server on this machine that speaks the hub's API."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from cdm.errors import CdmError
from cdm.handover.export import export
from cdm.handover.push import card_on_hub, push
from tests.stand_in_hub import READER, WRITER, Hub
from tests.test_cli import Command, command  # noqa: F401 - a fixture
from tests.test_export import blocks, full_student, lora_student  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent

# huggingface_hub's own, of the library that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and somebody who is logged in to it and may write, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub().running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        yield running


@pytest.fixture
def exported(lora_student: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A LoRA: the smallest export."""
    return export(lora_student, tmp_path / "few-steps", "lora").path


def contents(path: Path) -> dict[str, bytes]:
    """Content of the files of an export but for its card, by the names that they are to have on a hub."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    found = {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    del found["README.md"]
    return found


@pytest.mark.parametrize(
    ("kind", "layout", "name", "loads"),
    [
        ("full_student", "diffusers", "out", 'from_pretrained("org/few-steps"'),
        ("lora_student", "lora", "out", 'load_lora_weights("org/few-steps"'),
        (
            "full_student",
            "single-file",
            "out.safetensors",
            '"https://huggingface.co/org/few-steps/blob/main/out.safetensors", config=',
        ),
    ],
)
def test_an_export_of_every_format_is_pushed_with_its_card(
    command: Command,  # noqa: F811
    hub: Hub,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    layout: str,
    name: str,
    loads: str,
) -> None:
    student = request.getfixturevalue(kind)
    result = command("export", student, "--format", layout, "--out", name, "--push", "org/few-steps")
    assert (result.code, result.err) == (0, ""), result.err
    assert result.out.splitlines()[-1] == f"{hub.address}/org/few-steps"
    (pushed,) = (hub.repositories["org/few-steps"].commits,)
    assert len(pushed) == 1, "one commit"
    files = dict(pushed[0])
    card = files.pop("README.md").decode()
    assert files == contents(tmp_path / name)
    assert not hub.repositories["org/few-steps"].private
    assert ModelCard(card).data.library_name == "diffusers"
    assert "# few-steps\n" in card
    (code,), (lines,) = blocks(card, "python"), blocks(card, "")
    assert loads in code
    fetch, draw = lines.splitlines()
    assert fetch.startswith("hf download org/few-steps ")
    assert f"--student {name} " in draw
    local = Path("out.md" if layout == "single-file" else "out/README.md").read_text()
    assert "org/few-steps" not in local, "here it is loaded from its path"


def test_it_is_pushed_again_and_what_else_is_there_stays(hub: Hub, exported: Path) -> None:
    push(str(exported), "org/few-steps")
    hub.repositories["org/few-steps"].commits[0]["LICENSE"] = b"theirs"
    assert push(exported, "org/few-steps") == f"{hub.address}/org/few-steps"
    assert len(hub.repositories["org/few-steps"].commits) == 2
    assert hub.repositories["org/few-steps"].files["LICENSE"] == b"theirs"


def test_a_private_repository_is_private_or_nothing_is_pushed(
    command: Command,  # noqa: F811
    hub: Hub,
    exported: Path,
) -> None:
    assert command("push", exported, "org/secret", "--private").code == 0
    assert hub.repositories["org/secret"].private
    push(exported, "org/public")
    error = command("push", exported, "org/public", "--private").error
    assert error.startswith("error: org/public: is there already, for everybody to see: nothing was pushed.")
    assert len(hub.repositories["org/public"].commits) == 1
    push(exported, "org/secret")
    assert hub.repositories["org/secret"].private, "it stays so"


@pytest.mark.parametrize(
    ("token", "refuses", "repository", "message"),
    [
        ("hf_unknown", {}, "org/few-steps", "does not take the token: log in again with `hf auth login`."),
        (READER, {}, "org/few-steps", "the token may not write there (You don't have the rights"),
        (WRITER, {}, "others/few-steps", "the token may not write there (You don't have the rights"),
        (WRITER, {"/commit/": 413}, "org/few-steps", "answers 413: refused with 413."),
        (WRITER, {"/blobs/": 400}, "org/few-steps", "answers 400: "),
    ],
)
def test_what_the_hub_refuses_is_a_line_and_the_export_is_whole(
    command: Command,  # noqa: F811
    hub: Hub,
    lora_student: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    refuses: dict[str, int],
    repository: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refuses = refuses
    out = tmp_path / "an export"
    result = command("export", lora_student, "--format", "lora", "--out", out, "--push", repository)
    assert result.error.startswith(f"error: {repository}: not pushed: ")
    assert message in result.error
    assert token not in result.error
    assert (out / "README.md").is_file()
    again = result.error.partition(" is whole; to push it: ")[2]
    hub.refuses = {}
    monkeypatch.setenv("HF_TOKEN", WRITER)
    words = ["org/few-steps" if word == repository else word for word in shlex.split(again)]
    assert command(*words[1:]).code == 0
    assert hub.repositories["org/few-steps"].files.keys() == {"README.md", *contents(out)}


def test_a_hub_that_is_not_there_is_a_line(
    command: Command,  # noqa: F811
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Hub().running() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.address)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    result = command("push", exported, "org/few-steps", "--private")
    assert f"not pushed: {gone.address} cannot be reached (" in result.error
    assert result.error.endswith(
        f"{exported} is whole; to push it: cdm push {exported} org/few-steps --private"
    )


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    command: Command,  # noqa: F811
    hub: Hub,
    lora_student: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "few-steps"

    def refused(repository: str) -> str:
        return command("export", lora_student, "--format", "lora", "--out", out, "--push", repository).error

    assert "few-steps: no name for a hub: give ORG/NAME, or USER/NAME" in refused("few-steps")
    assert "a/b/c: no name for a hub: Repo id must be" in refused("a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("org/few-steps")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "not logged in to the hub: run `hf auth login`" in refused("org/few-steps")
    assert not out.exists()
    assert not hub.requests


def test_what_is_no_export_is_refused(hub: Hub, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    for path in (tmp_path, tmp_path / "absent", tmp_path / "a.safetensors"):
        with pytest.raises(CdmError, match="no export there, or one without its card"):
            push(path, "org/few-steps")
    (exported / "README.md").unlink()
    with pytest.raises(CdmError, match="one without its card"):
        push(exported, "org/few-steps")
    assert not hub.requests


def test_a_card_names_the_hub_only_where_something_is_loaded() -> None:
    card = '# a\n\n`a` is "a".\n\npipeline.load("a", x="a")\n\ncdm sample "PROMPT" --student a --steps 4\n'
    assert card_on_hub(card, "a", "org/b") == (
        '# b\n\n`a` is "a".\n\npipeline.load("org/b", x="a")\n\n'
        'hf download org/b --local-dir a\ncdm sample "PROMPT" --student a --steps 4\n'
    )


LOAD = """
import re, sys
from huggingface_hub import hf_hub_download

text = open(hf_hub_download("org/few-steps", "README.md")).read()
(code,) = re.findall(r"^```python\\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
exec(code)
"""


@pytest.mark.slow
def test_plain_diffusers_draws_with_what_was_pushed(full_student: Path, tmp_path: Path) -> None:  # noqa: F811
    """In processes of their own, which read HF_ENDPOINT and the token of the login as users' do."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(WRITER)
    with Hub().running() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, *arguments],
                check=False,
                cwd=tmp_path,
                env=environment,
                text=True,
                capture_output=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        options = ["--out", "out", "--push", "org/few-steps", "--private"]
        assert run("-m", "cdm.cli", "export", str(full_student), *options).endswith(
            f"{hub.address}/org/few-steps\n"
        )
        run("-c", LOAD)
        assert hub.repositories["org/few-steps"].private
        assert any(re.match(r"GET /org/few-steps/resolve/\w+/transformer/", line) for line in hub.requests)
    assert (tmp_path / "picture.png").is_file()
