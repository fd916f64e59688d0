"""Checkpoints: whole or not at all, damage found, one writer, bounded disk."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from cdm.errors import CdmError
from cdm.system import files
from cdm.training import checkpoint
from cdm.training.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    tensors = {"weights": {"a/b": torch.full((3, 2), float(step)), "count": torch.tensor(step)}}
    return Checkpoint(step, tensors, {"rows": [{"loss": 0.1 * step}], "updates": {"student": step}})


def test_round_trip_is_exact(tmp_path: Path):
    saved = make(7)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.state) == (7, saved.state)
    assert torch.equal(loaded.tensors["weights"]["a/b"], saved.tensors["weights"]["a/b"])


def test_nothing_there(tmp_path: Path):
    assert checkpoint.load_newest(tmp_path / "none") is None


def test_the_last_two_are_kept(tmp_path: Path):
    for step in (2, 4, 10, 6):
        checkpoint.save(tmp_path, make(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no hashes", "torn hashes"])
def test_a_damaged_one_is_passed_over_with_a_word(tmp_path: Path, caplog, damage: str):
    checkpoint.save(tmp_path, make(1))
    checkpoint.save(tmp_path, make(2))
    weights = tmp_path / "step-00000002" / "weights.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[:-4])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no hashes":
        (weights.parent / "hashes.json").unlink()
    else:
        (weights.parent / "hashes.json").write_text('{"state.json": "')
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "step-00000002" in caplog.text


def test_an_unfinished_one_is_not_seen_and_is_cleared(tmp_path: Path):
    checkpoint.save(tmp_path, make(1))
    torn = [
        tmp_path / f"step-0000000{step}.partial" for step in (2, 3)
    ]  # the second of a signal, and then a kill
    for partial in torn:
        partial.mkdir()
        (partial / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path).step == 1
    checkpoint.save(tmp_path, make(2))
    assert checkpoint.load_newest(tmp_path).step == 2
    assert not any(partial.exists() for partial in torn)


def hold(folder: Path) -> None:
    with checkpoint.locked(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path):
    first = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path,))
    first.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
        assert first.is_alive()
    named = f"already running as process {first.pid} on {re.escape(socket.gethostname())}, since 2"
    for _ in range(2):  # a refusal leaves the name there
        with pytest.raises(CdmError, match=named), checkpoint.locked(tmp_path):
            pass
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with checkpoint.locked(tmp_path):
        pass


def test_a_lock_that_names_nobody_refuses_too(tmp_path: Path):
    with checkpoint.locked(tmp_path):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(CdmError, match=r"already running \(it holds"), checkpoint.locked(tmp_path):
            pass


def test_a_folder_that_is_given_back_meanwhile_is_made_again(tmp_path: Path, monkeypatch):
    """Between the opening of its lock and the locking, so that the lock is one of a folder that is gone."""
    folder, real, times = tmp_path / "distill-0", fcntl.flock, []

    def locked_after_removal(handle, operation: int) -> None:
        if not times:
            files.remove_folder(folder)
        times.append(operation)
        real(handle, operation)

    monkeypatch.setattr(checkpoint.fcntl, "flock", locked_after_removal)
    with checkpoint.locked(folder):
        assert len(times) == 2
        monkeypatch.undo()
        with pytest.raises(CdmError, match="already running"), checkpoint.locked(folder):
            pass


def test_what_is_not_done_or_still_runs_is_not_given_back(tmp_path: Path, caplog):
    folder = tmp_path / "distill-0"
    checkpoint.give_back(folder, 4)  # there is none
    checkpoint.save(folder, make(2))
    checkpoint.give_back(folder, 4)
    assert checkpoint.load_newest(folder) is not None
    checkpoint.save(folder, make(4))
    with checkpoint.locked(folder), caplog.at_level(logging.WARNING):
        checkpoint.give_back(folder, 4)
    assert "already running" in caplog.text
    assert checkpoint.load_newest(folder) is not None
    checkpoint.give_back(folder, 4)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_has_left_of_a_removal_is_cleared_by_the_next_training(tmp_path: Path, monkeypatch):
    folder = tmp_path / "distill-0"
    checkpoint.save(folder, make(4))
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *args, **options: None)
        files.remove_folder(folder)
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with checkpoint.locked(tmp_path / "distill-1"):
        assert [path.name for path in tmp_path.iterdir()] == ["distill-1"]
