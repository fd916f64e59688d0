"""The GPU's benchmark, rehearsed on the CPU: every part on tiny sizes, and what happens where one fails."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import BESIDE, LIMITS, ORDER, QUICK_ORDER, Session
from benchmarks.gpu.part import PARTS, Notes, load
from benchmarks.gpu.report import markdown
from benchmarks.gpu.scale import DEFAULT, TINY
from cdm.training.compiling import compile_blocks
from tests.conftest import ROOT
from tests.gpu import test_training as on_a_gpu
from tests.gpu import world
from tests.launching import python

LONG = (
    "cpu_stages",
    "stages",
    "miniature",
    "tests",
    "plans",
    "lora",
    "full",
    "sampling",
    "settings",
    "compile",
    "compiled_round",
    "allocator",
)
"""Parts that take longer, some because they start processes of their own: `test_everything` has them too."""


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    return {"command": "rehearsal", "parts": {}}


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Any:
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", [name for name in PARTS if name not in LONG])
def test_a_part(name: str, tmp_path: Path, results: dict[str, Any]) -> None:
    notes = Notes(tmp_path / "found.json")
    load(name)(TINY, notes)
    found = json.loads(notes.path.read_text())
    assert found == notes.found
    results["parts"][name] = {"status": "done", "seconds": 1.0, "found": found}
    assert "Incomplete" not in markdown(results)


def test_every_part_has_its_place_and_limit() -> None:
    for order in (ORDER, (*QUICK_ORDER, ("compiled_round",))):
        assert {name for group in order for name in group} | set(BESIDE) == set(PARTS) == set(LIMITS)


def test_sizes_are_the_published_ones() -> None:
    from dataclasses import replace

    from benchmarks.gpu.sampling import build

    pipeline = build(replace(DEFAULT, device="meta"))
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
    counts = [sum(value.numel() for value in getattr(pipeline, name).parameters()) for name in names]
    assert counts == [123_650_304, 694_659_840, 4_762_310_656, 2_028_328_000, 83_819_683]


@pytest.mark.slow
def test_results_are_written_and_a_failure_costs_only_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no_such_plugin")
    monkeypatch.setattr(sys, "executable", str(python()))
    assert not Session(tmp_path, "tiny", ["machine", "tests"], 300).run()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in results["parts"].items()} == {
        "machine": "done",
        "tests": "failed",
    }
    assert "no_such_plugin" in (tmp_path / "gpu.md").read_text()


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "executable", str(python()))
    assert Session(tmp_path, "tiny", ["machine"], 1).run()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["parts"]["machine"]["status"] == "left out"


def test_results_of_a_run_that_was_cut_off_are_tables_too(results: dict[str, Any]) -> None:
    """Of a card that was lent for too short a time, with the notes on it."""
    recorded = json.loads((ROOT / "benchmarks/results/h200.json").read_text())
    assert "stopped" in {part["status"] for part in recorded["parts"].values()}
    assert markdown(recorded) == (ROOT / "benchmarks/results/h200.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", world.CASES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.filterwarnings("default")  # torch's compiler hides those that it makes
def test_the_tests_for_a_gpu_hold_on_the_cpu(
    case: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they can be run at all: a card is seldom at hand."""
    monkeypatch.setattr(on_a_gpu, "DEVICE", world.CPU)
    monkeypatch.setattr(world, "compile_blocks", partial(compile_blocks, backend="eager"))
    on_a_gpu.check_resumed(world.settings(compiled=compiled, **world.CASES[case]), tmp_path)


@pytest.mark.slow
@pytest.mark.nightly
def test_everything(tmp_path: Path) -> None:
    command = [python(), "-m", "benchmarks.gpu", "--out", str(tmp_path), "--tiny", "--seconds", "1500"]
    done = subprocess.run(command, cwd=ROOT, check=False, text=True, capture_output=True, timeout=1600)
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in results["parts"].items()} == dict.fromkeys(PARTS, "done")
    assert "Incomplete" not in (tmp_path / "gpu.md").read_text()
