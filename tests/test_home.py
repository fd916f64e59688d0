"""`~` is the home folder wherever a path is written: in a params file, on the command line, in the library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from cdm.external import record_prompts
from cdm.models.hub import resolve
from cdm.models.manifest import describe
from cdm.models.student import find_student
from cdm.params import Params, load
from cdm.preflight import check_paths
from cdm.system.files import Memory, arguments_at_home, at_home
from tests.test_cli import Command, command  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_begins_at_home_where_it_says_so(home: Path) -> None:
    assert at_home("~") == home
    assert at_home("~/models/mine") == at_home(Path("~/models/mine")) == home / "models/mine"
    for path in ("models/~/mine", "~somebody-else/x", "org/name", "./x", "/x"):
        assert at_home(path) == Path(path)
    arguments = ["sample", "~ a cat", "--out=~/x.png", "--student", "~/student", "--x=a~/b", "~\n"]
    assert arguments_at_home(arguments) == [
        "sample",
        "~ a cat",
        f"--out={home}/x.png",
        "--student",
        f"{home}/student",
        "--x=a~/b",
        "~\n",
    ]


def written(value: Any, path: str = "") -> dict[str, str]:
    """Every text in a params file, by its dotted key."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return {
            key: text for name, each in value.items() for key, text in written(each, f"{path}.{name}").items()
        }
    if isinstance(value, list):
        return {
            key: text for k, each in enumerate(value) for key, text in written(each, f"{path}[{k}]").items()
        }
    return {path.removeprefix("."): value} if isinstance(value, str) else {}


def test_every_path_of_a_params_file_may_begin_at_home(home: Path) -> None:
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["teacher"]["source"] = "~/teacher"
    values["prompts"] |= {"train": ["~/a.txt", "~/b.txt"], "eval": ["~/c.txt"]}
    values["evaluate"] |= {"judge": "~/judge", "real": "~/real.safetensors"}
    keys = ("clip", "dinov2", "pick_score", "hps", "inception", "aesthetic", "lpips")
    values["evaluate"]["models"] = {key: f"~/{key}" for key in keys}
    values["runtime"]["accelerate_config"] = "~/fsdp.yaml"
    with (home / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    params = load("~/params.yaml")
    texts = written(params)
    assert sum(text.startswith(f"{home}/") for text in texts.values()) == 14
    assert not [key for key, text in texts.items() if "~" in text]
    text_fields = {key for key, text in texts.items() if "/" in text and not key.startswith("evaluate.scorers")}
    assert {key for key, text in texts.items() if text.startswith(f"{home}/")} == text_fields


def test_what_lies_at_home_is_found(home: Path, tiny_sd3: Path, tiny_params: Params) -> None:
    shutil.copytree(tiny_sd3, home / "teacher")
    (home / "a.txt").write_text("a red three")
    values = tiny_params.model_dump()
    values["teacher"]["source"] = "~/teacher"
    values["prompts"] |= {"train": ["~/a.txt"], "eval": []}
    values["evaluate"] |= {"judge": None, "real": None}
    params = Params.model_validate(values)
    check_paths(params)
    record_prompts(params.prompts, Path("prompts.json"), Memory())
    assert list(json.loads(Path("prompts.json").read_text())) == [f"{home}/a.txt"]
    assert resolve("~/teacher") == home / "teacher"
    assert describe("sd3", "~/teacher", None).digest == describe("sd3", str(tiny_sd3), None).digest
    assert find_student(Path("~/teacher")).base == home / "teacher"


def test_a_command_takes_it_where_a_shell_leaves_it(home: Path, command: Command) -> None:  # noqa: F811
    assert command("recipe", "use", "sd3-medium", "--to=~/p.yaml", f"--recipes={ROOT}/recipes").code == 0
    assert (home / "p.yaml").is_file()
    assert not (home / "~").exists()
    (line,) = command("params", "check", "~/absent.yaml").err.splitlines()
    assert line.startswith(f"error: {home}/absent.yaml: cannot be read")
