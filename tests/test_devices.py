"""The device of `runtime.device`, whose number is obeyed: here there is no GPU, so what would touch one is watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState

from cdm.data import prompts, sampling
from cdm.errors import CdmError
from cdm.evaluation import metrics
from cdm.measures import MEASURES
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.system import device, parent, processes
from cdm.system.launcher import launch
from cdm.training import loop, session
from tests.inputs import build_prompts, cache_latents, draw_samples

SECOND = torch.device("cuda:1")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs, and what happens to them."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"set {device}"))
    monkeypatch.setattr(torch, "empty", lambda size, device: done.append(f"touch {device}"))
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return done


def test_a_gpu_is_the_current_one_before_it_is_touched(gpus: list[str]) -> None:
    assert device.choose_device("cuda:1") == SECOND
    assert gpus == ["set cuda:1", "touch cuda:1"]


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "own"), [("0", 0), ("1", 1), ("3", 1)])
def test_a_launched_process_touches_its_own_alone(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch, name: str, rank: str, own: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert device.choose_device(name) == torch.device("cuda", own)
    assert gpus == [f"set cuda:{own}", f"touch cuda:{own}"]


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Of accelerate, which takes the first GPU; the arguments that it was made with are in `made`."""

    def make(**arguments: Any) -> SimpleNamespace:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return SimpleNamespace(made=arguments, num_processes=count, device=torch.device("cuda:0"))

    monkeypatch.setattr(accelerate, "PartialState", make)
    return make


@pytest.mark.usefixtures("gpus", "state")
def test_alone_it_is_the_one_that_is_named() -> None:
    joined: Any = processes.join("cuda:1")
    assert joined.device == SECOND


@pytest.mark.usefixtures("gpus", "state")
def test_several_wait_so_long_and_talk_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the launch file says of loading: each process loads what it needs."""
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    joined: Any = processes.join("auto", timedelta(hours=5))
    assert joined.made == {"cpu": False, "timeout": timedelta(hours=5), "device_id": SECOND}
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    with pytest.raises(CdmError, match=r"runtime\.device: cuda:1 is one device, .* set it to cuda$"):
        processes.join("cuda:1")


class AskedError(Exception):
    """Raised where a stage begins to use a device, with that device."""


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where `cuda:1` can be chosen."""

    def choose(name: str) -> torch.device:
        return torch.device(name)

    for module in (prompts, metrics, processes):
        monkeypatch.setattr(module, "choose_device", choose)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("second")
class TestStages:
    @pytest.fixture
    def params(self, tiny_params: Params) -> Params:
        runtime = tiny_params.runtime.model_copy(update={"device": "cuda:1"})
        return tiny_params.model_copy(update={"runtime": runtime})

    def asks(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, take: Callable[..., Any]) -> None:
        def ask(*arguments: Any, **options: Any) -> None:
            raise AskedError(take(*arguments, **options))

        monkeypatch.setattr(owner, name, ask)

    def test_prompts(
        self, params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.asks(monkeypatch, diffusers.DiffusionPipeline, "to", lambda _, device: device)
        with pytest.raises(AskedError) as asked:
            build_prompts(params, tiny_teacher, tmp_path / "prompts")
        assert asked.value.args == (SECOND,)

    def test_latents_and_sample(
        self,
        params: Params,
        tiny_params: Params,
        tiny_teacher: TeacherManifest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Both draw by `_sampler` on the device of `Processes.join`."""
        build_prompts(tiny_params, tiny_teacher, tmp_path / "prompts")
        cache_latents(tiny_params, tiny_teacher, tmp_path / "prompts", tmp_path / "latents")
        AcceleratorState._reset_state(reset_partial_state=True)  # that was on the CPU
        self.asks(monkeypatch, sampling, "_sampler", lambda device, *_, **__: device)
        with pytest.raises(AskedError) as asked:
            cache_latents(params, tiny_teacher, tmp_path / "prompts", tmp_path / "others")
        assert asked.value.args == (SECOND,)
        teacher = Path(tiny_teacher.source)  # the student is a pipeline, as the teacher is
        folders = (tmp_path / "prompts", tmp_path / "latents", tmp_path / "samples")
        with pytest.raises(AskedError) as asked:
            draw_samples(params, tiny_teacher, teacher, *folders)
        assert asked.value.args == (SECOND,)
        assert processes.Processes.join(params.runtime.device).device == SECOND

    def test_distill(self, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asks(monkeypatch, loop, "prepare", lambda params, inputs, accelerator: accelerator.device)
        monkeypatch.setattr(loop, "fingerprint", lambda *_: "0")
        inputs: Any = None
        with pytest.raises(AskedError) as asked:
            loop.distill(
                params,
                inputs,
                checkpoints=tmp_path / "checkpoints",
                student=tmp_path / "student",
                log=tmp_path / "log.csv",
            )
        assert asked.value.args == (SECOND,)

    def test_a_training_by_hand(
        self,
        params: Params,
        tiny_params: Params,
        tiny_teacher: TeacherManifest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        build_prompts(tiny_params, tiny_teacher, tmp_path / "prompts")
        self.asks(monkeypatch, session, "prepare", lambda params, inputs, accelerator: accelerator.device)
        monkeypatch.setattr(session.prompts, "build_missing", lambda *_, **__: None)
        with pytest.raises(AskedError) as asked:
            session.Distillation(params, tmp_path)
        assert asked.value.args == (SECOND,)

    def test_evaluate(self, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asks(monkeypatch, metrics, "_Bench", lambda *arguments: arguments[-1])
        name = next(name for name, measure in MEASURES.items() if measure.kind == "score")
        section = params.evaluate.model_copy(update={"metrics": [name], "resamples": 0})
        samples: Any = SimpleNamespace(texts=["a one"])
        with pytest.raises(AskedError) as asked:
            metrics.measure_chosen(section, samples, None, tmp_path, seed=0, runtime=params.runtime)
        assert asked.value.args == (SECOND,)


class TestTimeToSave:
    """After a signal to stop: torch's launcher reads a variable."""

    @pytest.mark.parametrize("own", [None, "77"])
    def test_the_launcher_gives_it_unless_the_user_has(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str | None
    ) -> None:
        monkeypatch.setattr(os, "environ", {**os.environ})
        for name in (parent.SHUTDOWN, "LOCAL_RANK", "CDM_LAUNCHED"):
            os.environ.pop(name, None)
        if own:
            os.environ[parent.SHUTDOWN] = own
        given = []
        monkeypatch.setattr(
            "cdm.system.launcher._run", lambda arguments: given.append(os.environ[parent.SHUTDOWN])
        )
        (tmp_path / "launch.yaml").touch()
        with pytest.raises(SystemExit):
            launch("stages.distill", str(tmp_path / "launch.yaml"))
        assert given == [own or str(parent.GRACE)]
        assert parent.grace() == float(own or parent.GRACE)

    def test_torch_reads_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.distributed.launcher.api import LaunchConfig

        monkeypatch.setenv(parent.SHUTDOWN, str(parent.GRACE))
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
        if not hasattr(config, "shutdown_timeout"):
            pytest.skip("torch 2.11 always gives 30 seconds")
        assert config.shutdown_timeout == parent.GRACE

    def test_what_is_no_number_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(parent.SHUTDOWN, "soon")
        assert parent.grace() == parent.GRACE
