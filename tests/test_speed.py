"""The plan on a CPU: what is measured there, what is measured in its place where that would take too long or too much
memory, and what the plan makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from cdm.errors import CdmError
from cdm.families.configs import TRANSFORMER, read_config
from cdm.params import Params
from cdm.planning import architecture, forwards, memory, plan, speed, tables
from cdm.planning.architecture import Architecture
from cdm.planning.plan import Speed
from cdm.system import host
from tests.test_plan import ONE_GRAPH, changed, leave_out_passes, planned_pipeline, run_plan
from tests.tiny_pipelines import BUILDERS

ENDLESS = 1 << 60


@pytest.fixture
def tiny(tiny_params: Params) -> Architecture:
    return architecture.find(tiny_params.teacher, tiny_params.prompts.max_sequence_length)


def with_blocks(architecture: Architecture, blocks: int) -> Architecture:
    config = read_config(architecture.configs, TRANSFORMER) | {"num_layers": blocks}
    return replace(architecture, configs={TRANSFORMER: config})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass is run twice and no more, and there is memory for all of it."""
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(host, "free_memory", lambda: ENDLESS)


def counted(learner: Architecture, **_: object) -> tuple[int, int]:
    """FLOPs that need no model: of blocks and latents alone."""
    blocks = read_config(learner.configs, TRANSFORMER)["num_layers"]
    forward = 100 * blocks * prod(learner.latent_shape)
    return forward, 3 * forward


def test_passes_of_the_transformer_are_measured(tiny: Architecture, tiny_params: Params) -> None:
    found = speed.measure(tiny_params, tiny)
    assert found is not None
    assert found.forward > 0
    assert found.update > 0
    assert found.threads >= 1
    assert 1 <= found.samples <= 48
    assert 0 < found.share <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lora_is_measured_as_it_is_trained(
    tiny: Architecture, tiny_params: Params, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    lora = {"lora": {"rank": 2, "alpha": 4.0}, "precision": precision, "gradient_checkpointing": True}
    monkeypatch.setattr(speed, "has_room", lambda *_: True)
    found = speed.measure(changed(tiny_params, distill={**lora, "batch_size": 2}), tiny)
    assert found is not None
    assert min(found.forward, found.update) > 0


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_smaller_runs_for_every_family(
    name: str, tiny_params: Params, tiny_pipeline: Callable[[str], Path]
) -> None:
    whole = planned_pipeline(name, tiny_pipeline(name), tiny_params)
    long = {each: (64, *shape[1:]) if len(shape) > 1 else shape for each, shape in whole.text_shapes.items()}
    candidates = list(speed.smaller(replace(whole, text_shapes=long), 3))
    assert [(samples, scaled) for _, samples, scaled in candidates[:3]] == [(3, None), (2, None), (1, None)]
    smallest, samples, scaled = candidates[-1]
    assert samples == 1
    assert scaled is not None
    assert scaled.endswith("on 4 x 4 latents and 16 text tokens")
    assert min(speed.time_passes(smallest, 1, None, checkpointing=False)) > 0


def test_what_is_smaller_takes_fewer_flops(tiny: Architecture) -> None:
    *_, (whole, _, unscaled), (blocks, _, _), (smallest, _, _) = speed.smaller(with_blocks(tiny, 3), 1)
    assert unscaled is None
    assert plan.flops(smallest) < plan.flops(blocks) < plan.flops(whole)


@pytest.mark.parametrize(
    ("per_sample", "room", "samples", "scaled"),
    [
        (0.001, 48, 48, None),
        (0.05, 48, 12, None),
        (0.001, 7, 6, None),
        (5.0, 48, 1, "2 of 12 blocks on 8 x 8 latents and 8 text tokens"),
        (50.0, 48, 1, "2 of 12 blocks on 4 x 4 latents and 8 text tokens"),
        (0.001, 0, 1, "a product of matrices"),
        (50.0, 0, 1, "a product of matrices"),
    ],
)
def test_what_is_measured_is_as_large_as_a_second_and_the_memory_allow(
    tiny: Architecture,
    tiny_params: Params,
    monkeypatch: pytest.MonkeyPatch,
    per_sample: float,
    room: int,
    samples: int,
    scaled: str | None,
) -> None:
    """On a CPU that takes so many seconds for the two passes of one sample, and has room for so many samples."""
    large = with_blocks(tiny, 12)
    forward, update = counted(large)
    rate = (forward + update) / per_sample

    def passes(learner: Architecture, samples: int, *_: object) -> tuple[float, float, float]:
        forward, update = counted(learner)
        return samples * forward / rate, samples * update / rate, 0.0

    monkeypatch.setattr(speed, "flops", counted)
    monkeypatch.setattr(speed, "matrix_rate", lambda: rate)
    monkeypatch.setattr(speed, "has_room", lambda learner, samples, _: samples <= room)
    monkeypatch.setattr(speed, "time_passes", passes)
    found = speed.measure(tiny_params, large)
    assert found is not None
    assert (found.samples, found.scaled) == (samples, scaled)
    # Whatever was measured, it stands for the whole transformer.
    assert found.forward == pytest.approx(forward / rate)
    assert found.update == pytest.approx(update / rate)


def test_there_is_room_for_weights_gradients_and_activations(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = with_blocks(tiny, 1)
    weights = 4 * memory.sizes(small).learning
    peak = memory.Network.from_architecture(small, cuda=False).update(1, 2).peak
    assert peak > weights, "gradients and activations"
    monkeypatch.setattr(host, "free_memory", lambda: round((weights + peak) / speed.MEMORY))
    assert speed.has_room(small, 2, None)
    assert not speed.has_room(small, 3, None)


def test_only_a_cpu_of_this_machine_is_measured(
    tiny: Architecture, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "time_passes", lambda *_, **__: pytest.fail("measured"))
    assert speed.measure(changed(tiny_params, runtime={"device": "cuda"}), tiny) is None
    with pytest.raises(CdmError, match="does not divide over 7 processes"):
        speed.measure(tiny_params, tiny, processes=7)


def test_the_run_takes_its_passes_at_that_speed(
    tiny: Architecture, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "flops", counted)
    params = changed(
        tiny_params, distill={"iterations": 100, "fake_only": 20, "batch_size": 8, "student_every": 2}
    )
    found = Speed(forward=0.001, update=0.004, threads=2, samples=8)
    seconds = 0.0
    for rounds, learns in ((10, False), (40, True)):
        calls = forwards.forwards_of_round(params.distill, params.schedule, 3.0, learns=learns)
        seconds += rounds * 8 * (calls.plain * 0.001 + calls.with_graph * 0.004)
    for rate in (1e9, 1e15):  # which then does not matter
        made = plan.plan_compute(params.distill, params.schedule, tiny, parts=1, rate=rate, speed=found)
        assert made.seconds == pytest.approx(seconds)


def test_the_table_says_minutes_and_how_they_were_found() -> None:
    def lines(found: Speed) -> list[str]:
        compute = plan.Compute(1, 3, 7.3, 1.0, 1.0, seconds=1140, speed=found)
        empty, *text = tables._time_lines(compute, 400e12, 0.4)
        assert not empty
        return text

    head, forward, update, run = lines(Speed(0.0008, 0.0025, threads=2, samples=48))
    assert head == "time on this CPU, 2 threads (measured on 48 at once; --flops: on a GPU)"
    assert forward.split()[-2:] == ["0.8", "ms"]
    assert update.split()[-2:] == ["2.5", "ms"]
    assert run.startswith("the run ")
    assert run.endswith(" 19 min")
    *_, alone = lines(Speed(0.0008, 0.0025, threads=2, samples=48, share=0.25))
    assert alone.startswith("the run, if nothing else ran here, about ")
    assert alone.endswith(" 4.8 min")
    scaled = lines(Speed(0.1, 0.4, 1, 1, "2 of 24 blocks on 16 x 16 latents"))[0]
    assert "1 thread (measured on 2 of 24 blocks on 16 x 16 latents, scaled by FLOPs" in scaled


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (12.34, "12.3 s"),
        (75, "1.2 min"),
        (1140, "19 min"),
        (9000, "2.5 h"),
        (5e6, "1,389 h"),
    ],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert tables._time(seconds) == text


def test_the_command_measures_unless_it_is_told_the_flops(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = changed(tiny_params, distill={"losses": ONE_GRAPH})
    leave_out_passes(monkeypatch)
    run_plan(params, tmp_path / "params.yaml", monkeypatch, "--json")
    compute = json.loads(capsys.readouterr().out)["compute"]
    assert compute["seconds"] > 0
    assert compute["speed"]["forward"] > 0
    run_plan(params, tmp_path / "params.yaml", monkeypatch, "--flops", "1e12")
    out = capsys.readouterr().out
    assert "time at 1 TFLOP/s a GPU, 40% used" in out
    assert "this CPU" not in out


def test_free_memory_is_what_a_container_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture's memory
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    whole = host.free_memory()
    assert whole > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1500\n")
    assert host.free_memory() == 500
    (tmp_path / "memory.current").write_text("1600\n")
    assert host.free_memory() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert host.free_memory() > 1 << 20
