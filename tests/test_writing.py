"""Files and folders appear whole or not at all, and may be read by those whom the umask lets read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdm.data.store import ShardWriter
from cdm.evaluation.judge import Judge, JudgeConfig
from cdm.system.writing import hidden, open_up, placed, replace
from cdm.training import checkpoint
from cdm.training.checkpoint import Checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[str]:
    return {stat.filemode(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


ALLOWED = {
    0o022: {"drwxr-xr-x", "-rw-r--r--"},
    0o027: {"drwxr-x---", "-rw-r-----"},
    0o002: {"drwxrwxr-x", "-rw-rw-r--"},
}


def test_what_is_written_is_open_to_those_whom_the_umask_lets_in(tmp_path: Path, umask: int) -> None:
    out = tmp_path / "all"
    out.mkdir()
    with placed(out / "one.safetensors") as path:
        save_file({"x": torch.zeros(2)}, path)
    with ShardWriter(out / "store", 2, {}) as writer:
        writer.append({"x": torch.zeros(3)})
    checkpoint.save(out / "checkpoints", Checkpoint(1, {"weights": {"x": torch.zeros(2)}}, {}))
    Judge(JudgeConfig({"ink": ["red"]}, widths=(1, 1, 1, 1, 1))).save(out / "judge")
    assert modes(out) == ALLOWED[umask]


def test_copies_of_read_only_files_may_be_written(tmp_path: Path, umask: int) -> None:
    with placed(tmp_path / "folder") as path:
        (path / "inside").mkdir(parents=True)
        (path / "inside" / "file").touch(mode=0o444)
        (path / "inside").chmod(0o555)
    assert modes(tmp_path / "folder") == ALLOWED[umask]


def test_the_bits_of_groups_and_programs_stay(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o2700)
        (tmp_path / "run").touch(mode=0o700)
        open_up(tmp_path / "shared")
        open_up(tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.filemode((tmp_path / "shared").stat().st_mode) == "drwxr-sr-x"
    assert stat.filemode((tmp_path / "run").stat().st_mode) == "-rwxr--r--"


def test_a_folder_takes_the_place_of_what_was_there_and_nothing_of_that_is_left(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "left").touch()
    for name in ("first", "second"):
        with placed(tmp_path / "out") as path:
            path.mkdir()
            (path / name).touch()
        assert [each.name for each in (tmp_path / "out").rglob("*")] == [name]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(NotADirectoryError), placed(tmp_path / "out") as path:
        path.mkdir()
    assert (tmp_path / "out").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_what_was_there_is_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def write() -> None:
        with placed(tmp_path / "out") as path:
            path.mkdir()
            (path / "new").touch()
            raise error

    with pytest.raises(error):
        write()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["old"]


def test_what_a_kill_has_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    (tmp_path / ".out.old").mkdir()
    (tmp_path / "out").mkdir()
    with placed(tmp_path / "out") as path:
        assert path == hidden(tmp_path / "out")
        path.mkdir()
    assert [each.name for each in tmp_path.rglob("*")] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with placed(tmp_path / "out") as path:
        path.mkdir()
        save_file({"x": torch.zeros(2)}, path / "x.safetensors")
    assert (tmp_path / "out").is_symlink()
    assert list(load_file(tmp_path / "disk" / "real" / "x.safetensors")) == ["x"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk", "out"]


def test_a_file_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"
    assert not (tmp_path / "new").exists()


def test_whatever_writes_tensors_writes_them_here() -> None:
    """A file of safetensors is private to its user, unless `placed` or `open_up` sees to it."""
    writers = [
        path
        for path in (ROOT / "cdm").rglob("*.py")
        if re.search(r"\bsave_file\(|\.save_pretrained\b|\btorch\.save\(", path.read_text())
    ]
    assert len(writers) > 3
    for path in writers:
        if path.name != "base.py":  # families write where a training or an export tells them to
            assert "from cdm.system.writing import" in path.read_text(), path
