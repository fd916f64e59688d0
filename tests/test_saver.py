"""Checkpoints that processes write together: in the background, resharded when they are read, whole or not at all."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cdm.errors import CdmError
from cdm.system.files import sha256, write_json
from cdm.training import checkpoint
from cdm.training.checkpoint import Checkpoint
from cdm.training.saver import Saver
from cdm.training.tensor_file import read_header, write_tensors
from tests.launching import succeed_in_two_processes
from tests.run_saver import SHAPES, assert_holds, numbers, state


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: steps 2 and, torn, 4."""
    out = tmp_path_factory.mktemp("saver")
    succeed_in_two_processes("tests.run_saver", out)
    return out


def test_one_process_reads_what_two_have_written(written: Path) -> None:
    saved = checkpoint.load_newest(written)
    assert saved is not None
    assert (saved.step, saved.state) == (2, state(2))
    assert_holds(saved.tensors, 2)


def test_each_process_has_written_its_slices_and_nothing_is_pickled(written: Path) -> None:
    names = {path.name for path in (written / "step-00000002").iterdir()}
    parts = {f"{group}-0000{part}-of-00002.safetensors" for group in ("student", "fake") for part in (1, 2)}
    assert names == {*parts, "state.json", "hashes.json"}
    header = read_header(written / "step-00000002/student-00002-of-00002.safetensors")
    slices = {name: (tuple(shape), tuple(begin)) for name, (_, shape, begin) in header.items()}
    assert slices == {"odd": ((16, 4), (17, 0)), "three": ((8, 2, 5), (9, 0, 0)), "even": ((4,), (4,))}


def test_a_file_is_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a/x": torch.tensor(2.0),
        "u": torch.arange(7, dtype=torch.uint8),
        "h": torch.randn(4, 4).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "none": torch.zeros(0, 3),
    }
    assert write_tensors(tmp_path / "t", tensors) == sha256(tmp_path / "t")
    read = load_file(tmp_path / "t")
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
    )


def test_files_of_the_library_are_read_as_before_slices(tmp_path: Path) -> None:
    """A checkpoint as it was written when every group was a file."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    save_file(numbers(3), folder / "student.safetensors")
    save_file({"step/odd": torch.tensor(3.0)}, folder / "student_optimiser.safetensors")
    (folder / "state.json").write_text('{"rows": []}')
    write_json(folder / "hashes.json", {path.name: sha256(path) for path in folder.iterdir()})
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert saved.groups == {"student", "student_optimiser"}
    assert saved.shapes("student_optimiser") == {"step/odd": (torch.float32, torch.Size([]))}
    assert {name: tuple(shape) for name, (_, shape) in saved.shapes("student").items()} == dict(
        sorted(SHAPES.items())
    )
    assert all(torch.equal(value, numbers(3)[name]) for name, value in saved.tensors["student"].items())


OTHERS = {
    "name": {"other": torch.zeros(1)},
    "shape": {"even": torch.zeros(9)},
    "type": {"even": torch.zeros(8).half()},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_one_of_other_tensors_is_refused(tmp_path: Path, kind: str) -> None:
    checkpoint.save(tmp_path, Checkpoint(1, {"student": numbers(1)}, {}))
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    with pytest.raises(CdmError, match=r"step-00000001: not of this training \(.*: remove it"):
        saved.fill("student", OTHERS[kind])


def test_alone_whole_tensors_are_written_at_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Accelerator(cpu=True), timedelta(minutes=1))
    saver.save(Checkpoint(5, {"student": numbers(5)}, state(5)))
    assert (tmp_path / "step-00000005/student.safetensors").exists()
    assert not saver.failed
    saver.wait()
    saved = saver.newest()
    assert saved is not None
    assert saved.step == 5
