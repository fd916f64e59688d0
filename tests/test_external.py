"""What lies outside the pipeline: its hashes change when it does, and nothing is read or asked for twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from cdm.external import record_evaluation, record_prompts, record_teacher
from cdm.models import manifest
from cdm.models.manifest import TeacherManifest
from cdm.params import Evaluate, Prompts, Teacher
from cdm.system import files
from cdm.system.files import Memory

ROOT = Path(__file__).parent.parent


def old(*paths: Path) -> None:
    """Make files old enough for their time of change to be trusted."""
    for path in paths:
        for each in [path, *path.rglob("*")]:
            os.utime(each, ns=(1_000_000_000_000_000_000, 1_000_000_000_000_000_000))


class Reads:
    """The names of the files that were hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = files.sha256

        def counted(path: Path) -> str:
            self.names.append(path.name)
            return original(path)

        monkeypatch.setattr(files, "sha256", counted)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class TestMemory:
    def test_a_file_is_read_again_only_where_it_changed(self, tmp_path: Path, reads: Reads) -> None:
        file, kept = tmp_path / "file", tmp_path / "deep" / "hashes.json"
        file.write_text("one")
        old(file)

        def hashed() -> str:
            with Memory.kept(kept) as memory:
                return memory.sha256(file)

        first = hashed()
        assert reads.take() == ["file"]
        assert hashed() == first
        assert reads.take() == []
        file.write_text("two")
        assert hashed() != first
        assert reads.take() == ["file"]

    def test_a_file_that_has_only_just_changed_is_not_trusted(self, tmp_path: Path, reads: Reads) -> None:
        (tmp_path / "file").write_text("one")
        memory = Memory()
        memory.sha256(tmp_path / "file")
        memory.sha256(tmp_path / "file")
        assert reads.take() == ["file", "file"]

    @pytest.mark.parametrize("content", ["", "[]", "{"])
    def test_a_damaged_one_is_begun_anew(self, tmp_path: Path, content: str) -> None:
        kept, file = tmp_path / "hashes.json", tmp_path / "file"
        kept.write_text(content)
        file.write_text("one")
        with Memory.kept(kept) as memory:
            assert memory.sha256(file) == files.sha256(file)
        assert set(json.loads(kept.read_text())) == {"files", "values"}

    def test_what_is_gone_is_forgotten(self, tmp_path: Path) -> None:
        file, kept = tmp_path / "file", tmp_path / "hashes.json"
        file.write_text("one")
        old(file)
        with Memory.kept(kept) as memory:
            memory.sha256(file)
        assert list(json.loads(kept.read_text())["files"]) == [str(file)]
        file.unlink()
        with Memory.kept(kept):
            pass
        assert json.loads(kept.read_text())["files"] == {}


def prompts(**changes: Any) -> Prompts:
    values = {"train": ["train.txt", "texts"], "eval": ["eval.txt"], "eval_count": 1, "max_sequence_length": 0}
    return Prompts(**{**values, **changes})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompt lists and what an evaluation reads."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "train.txt",
        "eval.txt",
        "texts/a.txt",
        "texts/notes.md",
        "judge/config.json",
        "judge/.hidden",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("real.safetensors", "score.py", "lpips.pth", "settings.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_prompt_lists_are_recorded_by_name(here: Path) -> None:
    def recorded(settings: Prompts) -> Any:
        record_prompts(settings, Path("data/inputs/prompts.json"), Memory())
        return json.loads(Path("data/inputs/prompts.json").read_text())

    before = recorded(prompts())
    assert list(before) == ["eval.txt", "texts", "train.txt"]
    assert list(before["texts"]) == ["a.txt"], "what is no prompt is not looked at"
    assert recorded(prompts(eval_count=5)) == before
    old(here / "train.txt")
    assert recorded(prompts()) == before, "a file that was only touched is the same"
    (here / "texts/a.txt").write_text("another")
    after = recorded(prompts())
    assert [name for name in before if before[name] != after[name]] == ["texts"]


@pytest.mark.parametrize(
    ("changed_file", "key"),
    [
        ("judge/config.json", "judge"),
        ("real.safetensors", "real"),
        ("score.py", "scorers"),
        ("settings.json", "scorers"),
        ("helper.py", "scorers"),
        ("lpips.pth", "models"),
        ("train.txt", None),
        ("judge/.hidden", None),
    ],
)
def test_what_an_evaluation_reads_is_recorded(here: Path, changed_file: str, key: str | None) -> None:
    (here / "score.py").write_text("import helper")
    (here / "helper.py").touch()
    settings = Evaluate(
        judge="judge",
        real="real.safetensors",
        metrics=["aesthetic"],
        models={"aesthetic": "lpips.pth", "clip": "clip", "lpips": "nowhere"},
        scorers=[{"name": "mine", "command": f"{sys.executable} score.py --settings settings.json --fast"}],
    )

    def recorded() -> Any:
        record_evaluation(settings, Path("evaluation.json"), Memory())
        return json.loads(Path("evaluation.json").read_text())

    before = recorded()
    assert set(before["models"]) == {"aesthetic", "clip"}, "only models of the chosen metrics"
    assert set(before["scorers"]["mine"]) == {"helper.py", "score.py", "settings.json"}
    (here / changed_file).write_text("changed")
    after = recorded()
    assert [name for name in before if before[name] != after[name]] == ([] if key is None else [key])


def test_nothing_named_is_nothing_recorded(here: Path) -> None:
    record_evaluation(Evaluate(), Path("evaluation.json"), Memory())
    assert json.loads(Path("evaluation.json").read_text()) == {
        "judge": None,
        "real": None,
        "models": {},
        "scorers": {},
    }


class TestTeacher:
    def test_an_unchanged_one_is_neither_read_nor_loaded(
        self, tiny_sd3: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, out = Path(shutil.copytree(tiny_sd3, tmp_path / "teacher")), tmp_path / "teacher.json"
        old(folder)
        settings, memory = Teacher(family="sd3", source=str(folder), guidance_scale=1), Memory()
        first = record_teacher(settings, out, memory)
        assert "diffusion_pytorch_model.safetensors" in reads.take()
        monkeypatch.setattr(manifest, "get_family", lambda name: pytest.fail(f"loaded {name}"))
        assert record_teacher(settings, out, memory) == first
        assert not {name for name in reads.take() if not name.endswith(".py")}

    def test_a_change_of_a_file_is_a_change_of_the_teacher(self, tiny_sd3: Path, tmp_path: Path) -> None:
        folder, out, memory = (
            Path(shutil.copytree(tiny_sd3, tmp_path / "teacher")),
            tmp_path / "t.json",
            Memory(),
        )
        settings = Teacher(family="sd3", source=str(folder), guidance_scale=1)
        before = record_teacher(settings, out, memory)
        config = folder / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 16}))
        after = record_teacher(settings, out, memory)
        assert (before.latent_shape, after.latent_shape) == ([4, 8, 8], [4, 16, 16])
        assert TeacherManifest.read(out).digest == after.digest != before.digest

    def test_a_hub_model_stays_at_its_commit_while_the_cache_has_it(
        self, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = "0" * 40, "1" * 40
        model = tmp_path / "cache" / "models--org--name"
        shutil.copytree(tiny_sd3, model / "snapshots" / first)
        shutil.copytree(tiny_sd3, model / "snapshots" / second)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(first)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        out, memory = tmp_path / "teacher.json", Memory()

        def revision(**changes: Any) -> str | None:
            named = {"family": "sd3", "source": "org/name", "guidance_scale": 1, **changes}
            return record_teacher(Teacher(**named), out, memory).revision

        assert revision() == first
        (model / "refs" / "main").write_text(second)
        assert revision() == first, "edited on the hub since"
        assert revision(revision="main") == second, "a branch that is named is followed"
        assert revision() == second
        assert revision(revision=first) == first
        shutil.rmtree(model / "snapshots" / first)
        assert revision() == second, "no longer in the cache"


@pytest.mark.slow
def test_a_second_look_imports_no_torch(tmp_path: Path) -> None:
    """The stage is asked at every `dvc repro`: where nothing changed it must cost next to nothing."""
    for name in ("params.yaml", "miniature"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = (
        "import sys; from pathlib import Path; from stages.teacher import main; main();"
        "print('torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
            check=True,
            text=True,
            capture_output=True,
        ).stdout.splitlines()[-1]
        for _ in range(2)
    ]
    assert found == ["True", "False"]
