"""The command and the stages as a user meets them: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from cdm import cli
from cdm.errors import CdmError
from cdm.handover import drawing
from cdm.params import Params
from stages import common, latents, prompts, sample, teacher

ROOT = Path(__file__).parent.parent


class Result:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The message of a failure: one line, no traceback."""
        assert self.code == 1, self.out
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> Result:
        return self.run(cli.main, *arguments)

    def stage(self, module: object, *arguments: str | Path) -> Result:
        return self.run(lambda: common.run(module.main), *arguments)  # type: ignore[attr-defined]

    def run(self, function: object, *arguments: str | Path) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["cdm", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            function()  # type: ignore[operator]
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *self.capsys.readouterr())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'pydantic', 'PIL'}"
    code = f"import sys, cdm.cli; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_names_every_command(command: Command) -> None:
    result = command("--help")
    assert result.code == 0
    for name in ("sample", "export", "plan", "params", "recipe"):
        assert name in result.out
    assert "--steps" in command("sample", "--help").out
    assert "check" in command("params", "--help").out


def test_one_prompt_makes_one_picture(command: Command, tiny_sd3: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "three.png"
    result = command(
        "sample", "a red three", "--student", tiny_sd3, "--steps", "2", "--seed", "5", "--out", out
    )
    assert result.code == 0
    assert result.out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
        assert picture.info == {"prompt": "a red three", "steps": "2", "seed": "5", "model": str(tiny_sd3)}
        pixels = torch.tensor(list(picture.get_flattened_data()), dtype=torch.uint8).reshape(32, 32, 3)
    expected = drawing.draw_pictures(tiny_sd3, ["a red three"], 2, seed=5, device="cpu")[0]
    assert torch.equal(pixels.permute(2, 0, 1), expected)
    first = out.read_bytes()
    command("sample", "a red three", "--student", tiny_sd3, "--steps", "2", "--seed", "5", "--out", out)
    assert out.read_bytes() == first
    command("sample", "a red three", "--student", tiny_sd3, "--steps", "2", "--seed", "6", "--out", out)
    assert out.read_bytes() != first


def test_several_prompts_make_several_pictures_or_a_grid(
    command: Command, tiny_sd3: Path, tmp_path: Path
) -> None:
    texts = ["a red three", "一匹の狐", "a blue six"]
    command("sample", *texts, "--student", tiny_sd3, "--out", tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png", "a-3.png"]
    with Image.open(tmp_path / "a-2.png") as picture:
        assert picture.info["prompt"] == "一匹の狐"
    command("sample", *texts, "--student", tiny_sd3, "--out", tmp_path / "b.png", "--grid")
    with Image.open(tmp_path / "b.png") as sheet, Image.open(tmp_path / "a-3.png") as third:
        assert sheet.size == (64, 64)
        assert sheet.info["prompt"].splitlines() == texts
        assert list(sheet.crop((0, 32, 32, 64)).get_flattened_data()) == list(third.get_flattened_data())


def test_zoom_makes_squares_of_pixels_and_keeps_the_metadata(
    command: Command, tiny_sd3: Path, tmp_path: Path
) -> None:
    for name, options in (("small", []), ("large", ["--zoom", "3"])):
        out = tmp_path / f"{name}.png"
        assert command("sample", "a", "b", "--grid", "--student", tiny_sd3, "--out", out, *options).code == 0
    with Image.open(tmp_path / "small.png") as small, Image.open(tmp_path / "large.png") as large:
        assert (small.size, large.size) == ((64, 32), (192, 96))
        assert small.info == large.info
        assert small.info["prompt"] == "a\nb"
        nearest = small.resize(large.size, Image.Resampling.NEAREST)
        assert nearest.tobytes() == large.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--steps", "0"], "--steps is 0: give a number from 1 to 1000"),
        (["a", "--seed", "-1"], "--seed is -1"),
        (["a", "--zoom", "0"], "--zoom is 0: give a number from 1 to 64"),
        (["a", "--zoom", "65"], "--zoom is 65: give a number from 1 to 64"),
        (["a", "--out", "a.jpg"], "--out is a.jpg: give a name that ends in .png"),
        (["a", "--out", "folder.png"], "--out: folder.png: a folder, where a file is to be written"),
        (["a", "--out", "file/a.png"], "--out: file: a file is in the way of a folder"),
        (["a", ""], "PROMPT is empty"),
        (["a"], "models/student: no student there: run `dvc repro`"),
        (
            ["a", "--student", "folder.png"],
            "folder.png/model_index.json: not a readable config of a diffusers folder",
        ),
        (["a", "--student", "pixart"], "no family draws with a PixArtAlphaPipeline (known: "),
        (["a", "--student", "broken"], "broken: cannot be loaded as StableDiffusion3Pipeline"),
        (["a", "--student", "whole", "--device", "abacus"], "the device 'abacus' cannot be used here"),
    ],
)
def test_every_mistake_is_a_line(
    command: Command,
    tiny_sd3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "pixart").mkdir()
    (tmp_path / "pixart" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    (tmp_path / "whole").symlink_to(tiny_sd3)
    shutil.copytree(tiny_sd3, tmp_path / "broken")
    (tmp_path / "broken" / "transformer" / "config.json").unlink()
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "a.png"]
    assert message in command("sample", *arguments).error
    assert not (tmp_path / "a.png").exists()


def test_params_check_accepts_the_repositorys_own_file(command: Command, tmp_path: Path) -> None:
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["teacher"] |= {"source": "org/model"}
    YAML().dump(values, tmp_path / "mine.yaml")
    result = command("params", "check", tmp_path / "mine.yaml")
    assert (result.code, result.out) == (0, f"{tmp_path / 'mine.yaml'}: in order\n")


def test_params_check_names_what_is_wrong(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nope.yaml: cannot be read" in command("params", "check", tmp_path / "nope.yaml").error
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    path = tmp_path / "mine.yaml"
    YAML().dump(values | {"sample": values["sample"] | {"stepz": 4}}, path)
    assert "sample.stepz: unknown key" in command("params", "check", path).error
    YAML().dump(values, path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()  # so that miniature/teacher cannot be a model on a hub
    result = command("params", "check", path)
    assert result.code == 1
    assert result.err.splitlines() == [
        "error: teacher.source: miniature/teacher: no such folder, and not a hub id (org/name)",
        "error: prompts.train: miniature/data/train.txt: no such file",
        "error: prompts.eval: miniature/data/eval.txt: no such file",
        "error: evaluate.judge: miniature/judge: no such folder",
        "error: evaluate.real: miniature/data/real.safetensors: no such file",
    ]


def as_file(params: Params, path: Path, **changes: dict[str, object]) -> None:
    values = json.loads(params.model_dump_json())
    for section, change in changes.items():
        values[section] |= change
    YAML().dump(values, path)


@pytest.fixture
def workspace(tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a params file in which the stages can run; it is the current one."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tiny = tiny_params.model_copy(
        update={"evaluate": tiny_params.evaluate.model_copy(update={"judge": None, "real": None})}
    )
    as_file(tiny, folder / "params.yaml")
    return folder


def test_stages_run_one_after_the_other(command: Command, workspace: Path, tiny_sd3: Path) -> None:
    assert command.stage(teacher).out == f"{tiny_sd3}: 23,792 parameters, latents [4, 8, 8]\n"
    assert command.stage(prompts).out.startswith("5 training prompts, 3 evaluation prompts\n")
    assert command.stage(latents).code == 0
    shutil.copytree(tiny_sd3, workspace / "models" / "student")
    assert command.stage(sample).code == 0
    assert sorted(path.name for path in (workspace / "data").iterdir()) == [
        ".hashes.json",
        "inputs",
        "latents",
        "none",
        "pairs",
        "prompts",
        "samples",
        "teacher.json",
    ]


@pytest.mark.parametrize("module", [teacher, prompts, latents, sample])
def test_every_stage_explains_itself(command: Command, module: object) -> None:
    result = command.stage(module, "--help")
    assert result.code == 0
    assert "--out" in result.out


def test_a_stage_without_its_inputs_says_which_stage_makes_them(
    command: Command, workspace: Path, tiny_sd3: Path
) -> None:
    for module in (prompts, latents, sample):
        assert "data/teacher.json: missing or damaged: run the stage `teacher`" in command.stage(module).error
    command.stage(teacher)
    assert (
        "data/prompts/eval/texts.json: missing or damaged: run the stage `prompts`"
        in command.stage(latents).error
    )
    command.stage(prompts)
    assert "data/latents: no such folder" in command.stage(sample).error
    command.stage(latents)
    assert "models/student: no student there" in command.stage(sample).error


def test_a_bad_path_of_the_last_stage_stops_the_first(
    command: Command, workspace: Path, tiny_params: Params
) -> None:
    as_file(
        tiny_params,
        workspace / "params.yaml",
        evaluate={"judge": "nojudge", "real": None},
    )
    assert command.stage(teacher).error == "error: evaluate.judge: nojudge: no such folder"
    assert not (workspace / "data").exists()


def test_a_stage_refuses_parameters_that_change_under_it(workspace: Path, tiny_params: Params) -> None:
    free = {"judge": None, "real": None}
    with common.stage("seed", "latents") as params:
        assert params.latents.steps == 4
        as_file(tiny_params, workspace / "params.yaml", sample={"steps": [8]}, evaluate=free)

    with common.stage("prompts.embed"):
        as_file(tiny_params, workspace / "params.yaml", prompts={"eval_count": 2}, evaluate=free)

    def edit_while_it_runs() -> None:
        with common.stage("seed", "latents"):
            as_file(tiny_params, workspace / "params.yaml", latents={"steps": 9}, evaluate=free)

    with pytest.raises(CdmError, match="latents changed while the stage ran"):
        edit_while_it_runs()


def test_threads_are_those_of_the_parameters(
    workspace: Path, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which is set, too, and must not stay so
    before = torch.get_num_threads()
    try:
        as_file(
            tiny_params,
            workspace / "params.yaml",
            runtime={"threads": 3},
            evaluate={"judge": None, "real": None},
        )
        with common.stage():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
