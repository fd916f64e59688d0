"""Training on the GPU: the CPU's numbers, the same after an interruption, sharded over NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate import Accelerator

from cdm.params import Params
from cdm.training import checkpoint, sharding
from cdm.training.checkpoint import Checkpoint
from cdm.training.saver import Saver
from tests.gpu.world import CASES, CPU, DEVICE, build, change, distance, go_on, settings, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]


def tensors(saved: Checkpoint) -> dict[str, torch.Tensor]:
    """All of them, whole."""
    return {
        f"{group}/{name}": sharding.whole_of(value.detach())
        for group, named in saved.tensors.items()
        for name, value in named.items()
    }


def differing(some: Checkpoint, others: Checkpoint) -> list[str]:
    mine, theirs = tensors(some), tensors(others)
    assert mine.keys() == theirs.keys()
    return [name for name, value in mine.items() if not torch.equal(value, theirs[name])]


@pytest.mark.parametrize(
    ("case", "tolerance"), [("full, fp32", 2e-3), ("full, bf16, gradient checkpointing", 0.2)]
)
def test_a_round_is_that_of_the_cpu(
    case: str, tolerance: float, record_property: Callable[[str, Any], None]
) -> None:
    params = settings(**CASES[case])
    metrics, changes = [], []
    for device in (DEVICE, CPU):
        state, distiller = build(params, device)
        before = weights(state)
        metrics.append(go_on(state, distiller, 1))
        changes.append(change(state, before))
    moved = distance(*changes)
    figures = max(abs(metrics[0][name] / value - 1) for name, value in metrics[1].items() if value)
    record_property("difference of the update", f"{moved:.1e}")
    record_property("of a figure", f"{figures:.1e}")
    assert moved < tolerance
    assert figures < tolerance


def eight_bits() -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    optimiser = {"lr": 1e-4, "warmup": 0, "states": "8bit"}
    return {"precision": "bf16", "student": optimiser, "fake": optimiser}


def case_settings(case: str) -> Params:
    if case == "full, bf16, 8-bit states":
        return settings(**eight_bits())
    return settings(**CASES[case])


@pytest.mark.parametrize("case", [*CASES, "full, bf16, 8-bit states"])
class TestExactness:
    def test_a_run_is_the_same_twice(self, case: str) -> None:
        params = case_settings(case)
        ends = []
        for _ in range(2):
            state, distiller = build(params, DEVICE)
            go_on(state, distiller, 3)
            ends.append(state.checkpoint())
        assert differing(*ends) == []

    def test_a_resumed_run_is_the_run(self, case: str, tmp_path: Path) -> None:
        check_resumed(case_settings(case), tmp_path)


def test_a_resumed_run_of_compiled_blocks_is_the_run(tmp_path: Path) -> None:
    case = "LoRA, bf16, gradient checkpointing"
    check_resumed(settings(compiled=True, **CASES[case]), tmp_path)


def check_resumed(params: Params, folder: Path) -> None:
    """Two rounds, a checkpoint and two more end where two rounds after a restart from it end."""
    whole, distiller = build(params, DEVICE)
    go_on(whole, distiller, 2)
    checkpoint.save(folder, whole.checkpoint())
    go_on(whole, distiller, 2)

    resumed, distiller = build(params, DEVICE)
    saved = checkpoint.load_newest(folder)
    assert saved is not None
    resumed.restore(saved)
    go_on(resumed, distiller, 2)
    assert differing(resumed.checkpoint(), whole.checkpoint()) == []
    assert resumed.rows == whole.rows


@pytest.fixture
def nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")  # a machine without a network has no other
    torch.cuda.set_device(0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_sharded_over_nccl(
    case: str, nccl: None, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Trained, saved and taken up again by FSDP2 as without it: in float32 to rounding, in bf16 about so."""
    params = settings(**CASES[case])
    autocast = torch.bfloat16 if params.distill.precision == "bf16" else None
    plain, distiller = build(params, DEVICE)
    before = weights(plain)
    expected = go_on(plain, distiller, 1)

    def spread_over(model: torch.nn.Module, fill: sharding.Fill = sharding.nothing) -> torch.nn.Module:
        return sharding.shard(model, DEVICE, autocast, fill)

    def spread() -> tuple[Any, Any]:
        return build(params, DEVICE, spread_over)

    state, distiller = spread()
    assert all(sharding.is_sharded(value) for value in state.student.parameters.values())
    metrics = go_on(state, distiller, 1)
    moved = distance(change(state, before), change(plain, before))
    record_property("difference of the update", f"{moved:.1e}")
    assert moved < (1e-3 if autocast is None else 0.2)
    assert metrics == pytest.approx(expected, rel=1e-3 if autocast is None else 0.1)

    with Saver(tmp_path / "checkpoints", Accelerator(), timedelta(minutes=1)) as saver:
        saver.save(state.checkpoint())
        go_on(state, distiller, 1)  # while it is written
    resumed, distiller = spread()
    saved = saver.newest()
    assert saved is not None
    resumed.restore(saved)
    go_on(resumed, distiller, 1)
    assert differing(resumed.checkpoint(), state.checkpoint()) == []
