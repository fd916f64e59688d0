"""A frozen base in 8 or 4 bits: the teacher to rounding, exact gradients, resumption, the bytes that are planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families import get_family
from cdm.models.manifest import describe
from cdm.params import Lora, Params
from cdm.planning import architecture, memory
from cdm.preflight import check_paths
from cdm.training import setup
from cdm.training.networks import LoraNetworks
from cdm.training.quantised import RoundedLinear, quantised_layers
from cdm.training.start import InFiles
from tests.crashing import crash_rounds
from tests.inputs import build_prompts
from tests.test_lora import WEIGHTS, plain_pipeline, points, trained  # noqa: F401 - a fixture
from tests.test_training import run
from tests.write_params import write_params

FAMILY = get_family("sd3")
BASES = ("8bit", "4bit")


def settings(base: str) -> Lora:
    return Lora(rank=3, alpha=12, targets="attention+feed-forward", base=base)  # type: ignore[arg-type]


def changed(params: Params, base: str) -> Params:
    distill = params.distill.model_copy(update={"lora": settings(base)})
    return params.model_copy(update={"distill": distill})


@pytest.mark.parametrize("base", BASES)
def test_without_bitsandbytes_it_is_refused_in_a_line(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setattr("cdm.preflight.find_spec", lambda package: None)
    with pytest.raises(CdmError) as caught:
        check_paths(changed(tiny_params, base))
    expected = f"distill.lora.base: {base} needs bitsandbytes: pip install bitsandbytes, or set it to precision"
    assert expected in str(caught.value).splitlines()


def test_sharded_it_is_refused_in_a_line(tiny_params: Params) -> None:
    with pytest.raises(
        CdmError, match=r"distill\.lora\.base 4bit does not work sharded: set it to precision, or use"
    ):
        setup._check_sharded(changed(tiny_params, "4bit").distill)


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("base", BASES)
class TestBases:
    @pytest.fixture
    def networks(self, tiny_sd3: Path, base: str) -> LoraNetworks:
        return trained(LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), settings(base), seed=1))

    def test_roles_are_those_of_the_whole_base_to_rounding(
        self,
        networks: LoraNetworks,
        tiny_sd3: Path,
        points: Any,  # noqa: F811
        base: str,
    ) -> None:
        whole = trained(LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), settings("precision"), seed=1))
        with torch.no_grad():
            for role in ("teacher", "student", "fake"):
                exact, rounded = whole.velocity(role, *points), networks.velocity(role, *points)
                assert not torch.equal(rounded, exact)
                error = (rounded - exact).norm() / exact.norm()
                assert error < (0.02 if base == "8bit" else 0.2)

    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    def test_gradients_are_those_of_the_rounded_base(
        self,
        tiny_sd3: Path,
        points: Any,  # noqa: F811
        base: str,
        gradient_checkpointing: bool,
    ) -> None:
        """By finite differences of the loss along each role's gradient."""
        networks = trained(
            LoraNetworks(
                FAMILY,
                FAMILY.load_transformer(tiny_sd3),
                settings(base),
                seed=1,
                gradient_checkpointing=gradient_checkpointing,
            )
        )

        def loss(role: Any) -> Tensor:
            return networks.velocity(role, *points).square().sum()

        networks.backward("student", loss("student"))
        parameters = networks.parameters("student")
        assert all(value.grad is not None for value in parameters.values())
        assert all(value.grad is None for value in networks.parameters("fake").values())
        length = torch.stack([value.grad.square().sum() for value in parameters.values()]).sum().sqrt()  # type: ignore[union-attr]
        ends = []
        with torch.no_grad():
            for sign in (1, -2):  # a step ahead, and one behind
                for value in parameters.values():
                    value.add_(value.grad, alpha=float(sign * 1e-2 / length))  # type: ignore[arg-type]
                ends.append(float(loss("student")))

        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(length), rel=0.02)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself
    def test_derivatives_are_those_of_the_whole_rounded_weight(self, base: str) -> None:
        layer = RoundedLinear(nn.Linear(64, 8).requires_grad_(False), base)
        x, tangent = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = layer(x)
        assert product.dtype == torch.bfloat16
        product.float().sum().backward()
        whole = layer.whole(torch.float32)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, whole.sum(0).expand(2, 3, 64), atol=2e-2, rtol=2e-2)
        forward, along = torch.func.jvp(layer, (x.detach(),), (tangent,))
        torch.testing.assert_close(forward, x.detach() @ whole.T + layer.bias)
        torch.testing.assert_close(along, tangent @ whole.T)

    def test_it_takes_the_bytes_that_are_planned(
        self, networks: LoraNetworks, tiny_params: Params, base: str
    ) -> None:
        found = architecture.find(tiny_params.teacher, 0)
        planner = memory.MemoryPlanner(changed(tiny_params, base), found, 1, "none")
        assert len(planner.rounded) > 10
        adapters = {id(value) for role in ("student", "fake") for value in networks.adapters[role].values()}  # type: ignore[index]
        held = sum(v.nbytes for v in networks.model.parameters() if id(v) not in adapters)
        held += sum(buffer.nbytes for buffer in networks.model.buffers())
        held += sum(scales(layer) for _, _, layer in quantised_layers(networks.model))
        planned = planner._kept()["teacher, the base of all"]
        assert held == pytest.approx(planned, rel=2e-3)

    def test_a_distillation_resumes_byte_for_byte_and_loads_in_diffusers(
        self, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
    ) -> None:

        world = tmp_path / "world"
        world.mkdir()
        lora = settings(base).model_dump()
        params = write_params(world, tiny_sd3, iterations=8, lora=lora, fake_knows_level=True)
        manifest = describe("sd3", str(tiny_sd3), None)
        manifest.write(world / "teacher.json")
        build_prompts(params, manifest, world / "prompts")

        def distil(out: Path) -> None:
            with pytest.raises(FileNotFoundError):  # `run` returns the weights of a full student
                run(world, out, params)

        distil(tmp_path / "whole")
        crash_rounds(monkeypatch, 6)
        with pytest.raises(RuntimeError, match="crash 6"):
            run(world, tmp_path / "torn", params)
        distil(tmp_path / "torn")
        for name in (f"student/{WEIGHTS}", "student/lora.json", "log.csv"):
            assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        plain_pipeline(tiny_sd3, tmp_path / "whole" / "student")


def scales(layer: nn.Linear) -> int:
    """Bytes that a rounded layer holds beside its weight."""
    state: Any = getattr(layer, "rounding", None)
    held = 0
    while state is not None:
        held += state.absmax.nbytes + state.code.nbytes
        state = state.state2
    return held


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_read_layer_by_layer_is_the_same(tiny_sd3: Path, base: str) -> None:
    """As one that is loaded whole and rounded then."""
    options: dict[str, Any] = {"seed": 1, "autocast": torch.bfloat16}
    mine = LoraNetworks(FAMILY, InFiles(FAMILY, tiny_sd3), settings(base), **options).model
    theirs = LoraNetworks(FAMILY, FAMILY.load_transformer(tiny_sd3), settings(base), **options).model
    held, expected = dict(mine.named_parameters()), dict(theirs.named_parameters())
    assert held.keys() == expected.keys()
    assert any(value.dtype == torch.uint8 for value in expected.values())
    for name, value in expected.items():
        assert held[name].dtype == value.dtype, name
        assert torch.equal(held[name], value), name
    layers = [module for module in mine.modules() if isinstance(module, RoundedLinear)]
    others = [module for module in theirs.modules() if isinstance(module, RoundedLinear)]
    assert layers
    for layer, other in zip(layers, others, strict=True):
        assert torch.equal(layer.whole(torch.float32), other.whole(torch.float32))
