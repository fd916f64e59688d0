"""The optimisers: 8-bit states keep what they must, exactly over interruptions and numbers of processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm.errors import CdmError
from cdm.models.manifest import describe
from cdm.params import Optimiser, Params
from cdm.planning import memory
from cdm.preflight import check_paths
from cdm.training.optim import Learner, fits_8bit, messages
from tests.crashing import crash_rounds
from tests.inputs import build_prompts
from tests.launching import succeed_in_two_processes
from tests.run_states import learner, network, restore
from tests.test_training import assert_same, run
from tests.write_params import write_params


def test_gradients_travel_in_messages_of_bounded_size() -> None:
    tensors = [torch.zeros(size) for size in (3, 4, 9, 1, 1)]
    assert [[len(t) for t in group] for group in messages(tensors, limit=7)] == [[3, 4], [9], [1, 1]]
    assert list(messages([])) == []


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((16, 256), True),
        ((15, 256), False),  # small
        ((64, 16, 4, 4), True),  # a convolution: a row is of 256
        ((1536, 64), False),  # a slice of it might end within a block
        ((8192,), False),
    ],
)
def test_8bit_states_are_for_large_parameters_of_whole_blocks(shape: tuple[int, ...], fits: bool) -> None:
    assert fits_8bit(shape) == fits


def test_8bit_states_without_bitsandbytes_are_refused_in_a_line(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny_params.distill.fake.model_copy(update={"states": "8bit"})
    changed = tiny_params.distill.model_copy(update={"fake": small})
    monkeypatch.setattr("cdm.preflight.find_spec", lambda package: None)
    with pytest.raises(CdmError) as caught:
        check_paths(tiny_params.model_copy(update={"distill": changed}))
    expected = "distill.fake.states: 8bit needs bitsandbytes: pip install bitsandbytes, or set it to fp32"
    assert expected in str(caught.value).splitlines()


# With bitsandbytes


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def train(learner: Learner, updates: range) -> None:
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for parameter in learner.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        learner.step()


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
class TestEightBit:
    def test_states_are_bytes_where_they_fit_and_counted_so(self) -> None:
        small = learner("8bit")
        train(small, range(1))
        state = small.state()
        kinds = {name: {key.split("/")[0] for key in state if key.endswith(name)} for name in network()}
        assert kinds["wide"] == kinds["deep"] == {"step", "state1", "state2", "absmax1", "absmax2"}
        assert kinds["narrow"] == kinds["bias"] == {"step", "exp_avg", "exp_avg_sq"}
        assert state["state1/deep"].dtype == torch.uint8
        assert state["state1/deep"].shape == (17, 2, 256)
        assert state["absmax1/deep"].shape == (17, 2)

    def test_updates_are_those_of_adamw_to_the_rounding_of_the_states(self) -> None:
        small, exact = learner("8bit"), learner("fp32")
        train(small, range(8))
        train(exact, range(8))
        for name, start in network().items():
            moved = exact.parameters[name] - start
            error = small.parameters[name] - exact.parameters[name]
            assert error.abs().mean() < 0.03 * moved.abs().mean()
            assert bool(error.any()) == (name in ("wide", "deep"))

    def test_a_resumed_one_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        whole, first, second = learner("8bit"), learner("8bit"), learner("8bit")
        train(whole, range(7))
        train(first, range(4))
        save_file({name: value.contiguous() for name, value in first.state().items()}, tmp_path / "states")
        save_file({name: value.detach() for name, value in first.parameters.items()}, tmp_path / "weights")
        for name, value in load_file(tmp_path / "weights").items():
            second.parameters[name].data.copy_(value)
        restore(second, load_file(tmp_path / "states"), first.updates_done)
        train(second, range(4, 7))
        assert all(torch.equal(second.parameters[name], value) for name, value in whole.parameters.items())
        ends: list[dict[str, Tensor]] = [whole.state(), second.state()]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())

    def test_sharded_states_are_those_of_one_process_and_change_hands(self, tmp_path: Path) -> None:
        """33 and 17 rows over two processes: slices of different lengths."""
        succeed_in_two_processes("tests.run_states", tmp_path)
        whole, second = learner("8bit"), learner("8bit")
        train(whole, range(5))
        state = load_file(tmp_path / "states")
        for name, value in whole.state().items():
            exact = not name.startswith("exp_avg")  # torch's own may round the ends of a slice in another way
            torch.testing.assert_close(state[name], value, **({"rtol": 0, "atol": 0} if exact else {}))
        weights = load_file(tmp_path / "weights")
        for name in ("wide", "deep"):
            assert torch.equal(weights[name], whole.parameters[name])
        restore(second, state, 5)
        assert all(torch.equal(value, state[name]) for name, value in second.state().items())

    def test_a_distillation_resumes_byte_for_byte(
        self, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from miniature.teacher import build_transformer

        teacher = tmp_path / "teacher"
        shutil.copytree(tiny_sd3, teacher)
        build_transformer(layers=1, heads=4, head_dim=16).save_pretrained(teacher / "transformer")
        world = tmp_path / "world"
        world.mkdir()
        states = {"lr": 1e-3, "warmup": 4, "states": "8bit"}
        params = write_params(world, teacher, iterations=12, student=states, fake=states)
        manifest = describe("sd3", str(teacher), None)
        manifest.write(world / "teacher.json")
        build_prompts(params, manifest, world / "prompts")
        run(world, tmp_path / "whole", params)

        crashed = crash_rounds(monkeypatch, 6, 10)
        for expected in (6, 10):
            with pytest.raises(RuntimeError, match=f"crash {expected}"):
                run(world, tmp_path / "torn", params)
        run(world, tmp_path / "torn", params)
        assert_same(tmp_path / "torn", tmp_path / "whole")

        state = crashed[0].student.state()
        assert any(value.dtype == torch.uint8 for value in state.values())
        from cdm.planning import architecture

        size = memory.sizes(architecture.find(params.teacher, 0))
        assert sum(value.nbytes for value in state.values()) == memory.optimiser_bytes(
            size, params.distill.student
        )
        assert memory.optimiser_bytes(size, params.distill.student) < memory.optimiser_bytes(
            size, Optimiser(lr=1)
        )
