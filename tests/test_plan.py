"""The plan: what has an exact answer is exact, forwards are those that the engine makes, memory is what it takes."""

from __future__ import annotations

import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from ruamel.yaml import YAML
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cdm import cli
from cdm.errors import CdmError
from cdm.families import family_names, get_family
from cdm.families.configs import AUTOENCODER, TRANSFORMER, read_config
from cdm.models.manifest import describe
from cdm.params import Lora, Optimiser, Params, Schedule, Teacher, parse
from cdm.planning import architecture, forwards, memory, plan, tables
from cdm.planning import main_memory as main_memory_module
from cdm.planning.architecture import Architecture
from cdm.planning.decoding import plan_decoding
from cdm.planning.footprint import Footprint, LiveBytes, Network
from cdm.randomness import Draws
from cdm.schedule import draw_rollouts
from cdm.training import checkpoint
from cdm.training.distiller import Distiller
from cdm.training.networks import FullNetworks, LoraNetworks
from cdm.training.quantised import quantised_bytes, quantised_layers
from cdm.training.state import TrainingState
from reference import costs, watched
from reference.memory import measure
from reference.world import build, distill_settings
from tests.tiny_pipelines import BUILDERS, PROMPTS, RESOLUTION, TEXT_TOKENS

DYNAMIC = Schedule(kind="dynamic", min_len=2, max_len=6, sigma_min=0.1, sigma_max=0.9)
FIXED = Schedule(kind="fixed", min_len=1, max_len=1, sigma_min=0.02, sigma_max=0.98)
SHIFT = 2.0  # of reference.world


def changed(params: Params, **sections: dict[str, Any]) -> Params:
    values = params.model_dump()
    for section, changes in sections.items():
        values[section] |= changes
    return parse(values)


@pytest.fixture
def tiny(tiny_params: Params) -> Architecture:
    return architecture.find(tiny_params.teacher, tiny_params.prompts.max_sequence_length)


@pytest.fixture
def one_block(tiny: Architecture) -> Architecture:
    """The tiny transformer with one of its blocks: of what is not compared with the engine, the quickest to count."""
    config = read_config(tiny.configs, TRANSFORMER) | {"num_layers": 1}
    return replace(tiny, configs={TRANSFORMER: config, AUTOENCODER: read_config(tiny.configs, AUTOENCODER)})


def leave_out_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are not counted, which takes seconds, where a test reads nothing that comes of them."""
    monkeypatch.setattr(Network, "update", lambda *_, **__: Footprint(held=1000, peak=3000))
    monkeypatch.setattr(Network, "forward", lambda *_: Footprint(held=100, peak=500))


# Architectures


def count_stored(folder: Path) -> int:
    """Numbers in the safetensors files of a model, its constants included."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def planned_pipeline(name: str, folder: Path, params: Params) -> Architecture:
    """A tiny pipeline as it is planned, from its folder."""
    update = {"family": name.removesuffix("_t5"), "source": str(folder), "resolution": RESOLUTION}
    return architecture.find(params.teacher.model_copy(update=update), TEXT_TOKENS[name])


def test_a_folder_is_planned_from_its_configs(tiny: Architecture, tiny_sd3: Path) -> None:
    size = memory.sizes(tiny)
    assert size.stored == count_stored(tiny_sd3 / "transformer")
    assert size.learning == size.stored - 8 * 8 * 16  # the position embedding is constant
    assert size.learning == describe("sd3", str(tiny_sd3), None).parameters
    assert tiny.encoder_parameters == sum(map(count_stored, tiny_sd3.glob("text_encoder*")))
    assert tiny.shift == 3.0
    assert tiny.conditioning_bytes() == 4 * (8 * 64 + 64)  # 8 tokens and the pooled text, 64 wide


@pytest.mark.parametrize("name", BUILDERS)
def test_a_family_is_planned_as_its_pipeline_is(
    name: str, tiny_params: Params, tiny_pipeline: Callable[[str], Path]
) -> None:
    folder = tiny_pipeline(name)
    planned = planned_pipeline(name, folder, tiny_params)
    family = planned.family
    assert memory.sizes(planned).stored == count_stored(folder / "transformer")
    assert planned.encoder_parameters == sum(map(count_stored, folder.glob("text_encoder*")))
    assert planned.latent_shape == family.latent_shape(folder, RESOLUTION)
    assert planned.shift == family.shift(folder, RESOLUTION)
    conditioning = family.encode(family.load_pipeline(folder, image=False), PROMPTS, TEXT_TOKENS[name])
    assert planned.text_shapes == {name: tuple(value.shape[1:]) for name, value in conditioning.items()}
    assert 2 * planned.conditioning_bytes() == sum(value.nbytes for value in conditioning.values())


@pytest.mark.parametrize("name", BUILDERS)
def test_flops_are_those_of_the_real_model(
    name: str, tiny_params: Params, tiny_pipeline: Callable[[str], Path]
) -> None:
    folder = tiny_pipeline(name)
    planned = planned_pipeline(name, folder, tiny_params)
    model = planned.family.load_transformer(folder)
    inputs = {name: torch.rand_like(value) for name, value in planned.inputs(2).items()}
    # Torch's counter knows no kernel of attention on the CPU but the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        assert planned.velocity(model, inputs).shape == (2, *planned.latent_shape)
    assert counter.get_total_flops() == 2 * plan.flops(planned)[0]


SOURCES = [(family, source) for family in family_names() for source in get_family(family).published]
BILLIONS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": 2.03,
    "stabilityai/stable-diffusion-3.5-medium": 2.24,  # 2.47 with its positions, which do not learn
    "stabilityai/stable-diffusion-3.5-large": 8.06,
    "black-forest-labs/FLUX.1-dev": 11.9,
    "black-forest-labs/FLUX.1-schnell": 11.9,
    "meituan-longcat/LongCat-Image": 6.2,
    "Qwen/Qwen-Image": 20.4,
    "Tongyi-MAI/Z-Image": 6.15,
    "Tongyi-MAI/Z-Image-Turbo": 6.15,
}
"""Parameters of the transformer, as the authors of the models have published them."""


@pytest.mark.parametrize(("family", "source"), SOURCES, ids=lambda value: value.split("/")[-1])
def test_a_published_model_is_known_without_its_files(family: str, source: str, tiny_params: Params) -> None:
    teacher = tiny_params.teacher.model_copy(update={"family": family, "source": source})
    known = architecture.find(teacher, 128)
    assert known.family.count_parameters(known.configs) == pytest.approx(1e9 * BILLIONS[source], rel=0.03)
    assert known.latent_shape == (16, 128, 128)
    assert known.name == f"{source}, 1024 x 1024"


def test_published_configs_say_shift_and_text(tiny_params: Params) -> None:
    def known(family: str, source: str, **update: Any) -> Architecture:
        named = {"family": family, "source": source, **update}
        return architecture.find(tiny_params.teacher.model_copy(update=named), 256)

    medium = known("sd3", "stabilityai/stable-diffusion-3-medium-diffusers")
    assert medium.conditioning_bytes() == 4 * ((77 + 256) * 4096 + 2048)
    flux = known("flux", "black-forest-labs/FLUX.1-dev")
    assert flux.shift == pytest.approx(math.exp(1.15))
    smaller = known("flux", "black-forest-labs/FLUX.1-dev", resolution=512)
    assert smaller.shift == pytest.approx(math.exp(0.5 + 0.65 * 768 / 3840))
    assert smaller.latent_shape == (16, 64, 64)
    qwen = known("qwen_image", "Qwen/Qwen-Image")
    assert qwen.conditioning_bytes() == 256 * (4 * 3584 + 1)  # a byte of mask for each token
    assert known("z_image", "Tongyi-MAI/Z-Image").shift == 6.0


def test_a_hub_model_is_found_in_the_cache_and_else_refused(
    tiny_params: Params, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_params.teacher.model_copy(update={"source": "somebody/their-model"})
    message = (
        r"their-model is not on this disk, and not known without it \(of the family sd3, stabilityai/.* are\)"
    )
    with pytest.raises(CdmError, match=message):
        architecture.find(teacher, 0)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _, name, **options: str(tiny_sd3 / name)
    )
    assert architecture.find(teacher, 0).conditioning_bytes() == 4 * (8 * 64 + 64)


# Activations


def mlp(**options: Any) -> Network:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

    def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs["x"])

    return Network(layers, lambda batch: {"x": torch.empty(batch, 3)}, call, **options)


def test_activations_of_an_mlp_are_those_worked_out_by_hand() -> None:
    hidden, output = 4 * 5 * 4, 4 * 2 * 4
    # Before and after the ReLU both live for a moment; at the end only the output does.
    assert mlp().forward(4) == Footprint(held=output, peak=2 * hidden)
    # A graph keeps what left the ReLU, once though the ReLU and the second layer both save it.
    assert mlp().update(1, 4).held == hidden + output
    assert mlp().update(2, 4).held == 2 * (hidden + output)


def test_autocast_keeps_low_precision_copies_for_the_backward_pass() -> None:
    x, hidden, second_weight, output = 4 * 3 * 2, 4 * 5 * 2, 5 * 2 * 2, 4 * 2 * 4
    held = mlp(autocast=torch.bfloat16).update(1, 4).held
    assert held == x + hidden + second_weight + output  # the first weight is not needed: x wants no gradient


def test_cuda_autocast_normalises_in_float32() -> None:
    def network(cuda: bool) -> Network:
        return Network(
            lambda: nn.LayerNorm(6, elementwise_affine=False),
            lambda batch: {"x": torch.empty(batch, 6, dtype=torch.bfloat16)},
            lambda model, inputs: model(inputs["x"]),
            autocast=torch.bfloat16,
            cuda=cuda,
        )

    as_on_cpu, as_on_cuda = network(False).forward(4), network(True).forward(4)
    assert as_on_cuda.peak - as_on_cuda.held >= 4 * 6 * 4  # the input in float32
    assert as_on_cpu.peak - as_on_cpu.held < 4 * 6 * 4


def test_gradients_count_once_whether_new_accumulated_or_sharded() -> None:
    gradients = 4 * (3 * 5 + 5 + 5 * 2 + 2)
    batch = 1  # so that the peak is where all gradients are there
    new = mlp().update(1, batch).peak
    assert gradients <= new
    assert mlp().update(1, batch, accumulates=True).peak < new
    assert mlp(sharded=True).update(1, batch).peak < new


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in BUILDERS), ("sd3", True)])
def test_held_activations_are_the_saved_tensors(
    name: str, checkpointing: bool, tiny_params: Params, tiny_pipeline: Callable[[str], Path]
) -> None:
    """Against torch's own hooks on the real model: distinct storages that are not parameters, and the output."""
    folder = tiny_pipeline(name)
    planned = planned_pipeline(name, folder, tiny_params)
    model: Any = planned.family.load_transformer(folder)
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = {name: torch.rand_like(value) for name, value in planned.inputs(3).items()}
    constants = [value for module in model.modules() for value in vars(module).values()]
    tensors = [*model.parameters(), *model.buffers(), *inputs.values(), *constants]
    known = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
    references: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        references.append(weakref.ref(tensor))  # what leads to no output goes with its part of the graph
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = planned.velocity(model, inputs)
    saved = [tensor for reference in references if (tensor := reference()) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    total = sum(size for pointer, size in storages.items() if pointer not in known)
    held = Network.from_architecture(planned).update(1, 3, checkpointing=checkpointing).held
    assert held == pytest.approx(total + output.untyped_storage().nbytes(), rel=0.02)


# Forwards

ONLY = {
    name: {
        "ca": {"weight": float(name == "ca"), "scale": 2.0},
        "dm": {"weight": float(name == "dm")},
        "cdm": {"weight": float(name == "cdm")},
    }
    for name in ("ca", "dm", "cdm")
}


def terms(ca_bounded: bool, dm_bounded: bool) -> dict[str, Any]:
    return {
        "ca": {"weight": 1.0, "scale": 2.0, "bounded": ca_bounded},
        "dm": {"weight": 1.0, "bounded": dm_bounded},
        "cdm": {"weight": 0.0},
    }


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
@pytest.mark.parametrize(
    ("schedule", "micro_batch", "changes"),
    [
        (costs.AUTHORS, None, {}),
        (DYNAMIC, None, {}),
        (FIXED, None, {"student_every": 1}),
        (FIXED, None, {"student_every": 3, "iterations": 21, "gradient_checkpointing": True}),
        (FIXED, 12, {}),
        (FIXED, 12, {"losses": ONLY["cdm"]}),
        (FIXED, None, {"losses": ONLY["ca"]}),
        (FIXED, None, {"losses": ONLY["dm"]}),
        (FIXED, None, {"losses": ONLY["cdm"]}),
        (DYNAMIC, None, {"losses": terms(ca_bounded=True, dm_bounded=True)}),
        (DYNAMIC, None, {"losses": terms(ca_bounded=False, dm_bounded=True)}),
        (DYNAMIC, None, {"losses": terms(ca_bounded=False, dm_bounded=False)}),
    ],
)
def test_forwards_are_those_of_the_engine(
    schedule: Schedule, micro_batch: int | None, changes: dict[str, Any], rollouts: str
) -> None:
    counted = costs.count(Distiller, schedule, rollouts, 6, micro_batch, **changes)
    distill = distill_settings(rollouts=rollouts, **changes)
    parts = costs.BATCH // (micro_batch or costs.BATCH)
    planned = forwards.forwards_of_round(distill, schedule, SHIFT, parts=parts)
    assert planned.with_graph / distill.student_every == pytest.approx(counted.with_graph)
    random = 0.7 if schedule.max_len > 6 else 0.2  # four standard errors of the anchors' depth
    assert planned.plain / distill.student_every == pytest.approx(counted.forwards, abs=random)


@pytest.mark.parametrize("rollouts", ["shared", "fresh"])
def test_forwards_of_a_round_of_the_fake_score_alone(rollouts: str) -> None:
    distill = distill_settings(rollouts=rollouts, fake_only=2, batch_size=400)
    distiller, networks = build(distill=distill, schedule=FIXED)
    distiller.round(0)
    planned = forwards.forwards_of_round(distill, FIXED, SHIFT, learns=False)
    assert networks.samples["fake+graph"] / 400 == planned.with_graph
    assert networks.samples["student"] / 400 == pytest.approx(planned.plain, abs=0.3)


@pytest.mark.parametrize("spacing", ["stratified", "independent"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_mean_anchor_is_that_of_the_schedules(kind: str, shift: float, spacing: str) -> None:
    schedule = Schedule.model_validate(
        {
            "kind": kind,
            "min_len": 2,
            "max_len": 6,
            "sigma_min": 0.1,
            "sigma_max": 0.9,
            "spacing": spacing,
        }
    )
    rollouts = draw_rollouts(schedule, shift, Draws(0, 0, range(2000), torch.device("cpu")))
    assert forwards.mean_anchor_sigma(schedule, shift) == pytest.approx(
        float(rollouts.anchor_sigma.mean()), abs=0.03
    )
    depth = sum(rollouts.depth) / 2000
    assert forwards.mean_depth(schedule) == pytest.approx(depth, abs=0.12)
    assert forwards.first_share(schedule) == pytest.approx(rollouts.depth.count(0) / 2000, abs=0.04)


# Memory and disk


def engine_run(params: Params, folder: Path) -> TrainingState:
    """A run after one update of each role."""
    family, lora = get_family("sd3"), params.distill.lora
    teacher = family.load_transformer(folder)
    networks = FullNetworks(family, teacher) if lora is None else LoraNetworks(family, teacher, lora, seed=0)
    run = TrainingState.start(networks, params.distill)
    for learner in (run.student, run.fake):
        for parameter in learner.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.step()
    return run


@pytest.mark.parametrize("lora", [None, {"rank": 3, "alpha": 6.0}])
def test_optimisers_and_files_have_the_planned_bytes(
    tiny: Architecture, tiny_params: Params, tiny_sd3: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    params = changed(tiny_params, distill={"lora": lora})
    run = engine_run(params, tiny_sd3)
    size = memory.sizes(memory.as_learner(params.distill, tiny))
    planned = memory.optimiser_bytes(size, params.distill.student)
    assert sum(value.nbytes for value in run.student.state().values()) == planned
    disk = plan.plan_disk(params.distill, "fp32", tiny, size, prompts=10)
    saved = run.checkpoint()
    tensors = [value for group in saved.tensors.values() for value in group.values()]
    assert sum(value.nbytes for value in tensors) == disk.checkpoint
    assert disk.checkpoints == 3 * disk.checkpoint
    assert disk.embeddings == 10 * tiny.conditioning_bytes()
    checkpoint.save(tmp_path, saved)
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert disk.checkpoint < files < 2 * disk.checkpoint  # headers, which a large model makes small
    run.networks.save_student(run.average, tiny_sd3, tmp_path / "student")
    weights = tmp_path / "student" / ("transformer" if lora is None else "")
    assert disk.student == 4 * count_stored(weights)


def test_sharded_processes_keep_their_share_of_a_checkpoint_in_main_memory(
    tiny: Architecture, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_passes(monkeypatch)
    made = plan.make_plan(tiny_params, tiny, processes=2, sharding="fsdp")
    assert made.staging == made.disk.checkpoint // 2
    row = "in main memory, a checkpoint to be written"
    for each, said in ((made, [tables._bytes(made.staging)]), (replace(made, staging=0), [])):
        printed = tables.table(each, tiny_params.distill, 1e12, 0.5)
        assert [line.removeprefix(row).strip() for line in printed if row in line] == said


@pytest.mark.parametrize(
    ("distill", "micro_batch"),
    [
        ({}, None),
        pytest.param({"gradient_checkpointing": True}, 4, marks=pytest.mark.slow),
        pytest.param({"lora": {"rank": 3, "alpha": 6.0}}, None, marks=pytest.mark.slow),
    ],
)
def test_planned_memory_is_what_the_engine_takes(
    tiny: Architecture, tiny_params: Params, distill: dict[str, Any], micro_batch: int | None
) -> None:
    params = changed(
        tiny_params,
        distill={"batch_size": 8, "student_every": 1, "fake_only": 0, **distill},
        schedule={"min_len": 1, "max_len": 2},
        runtime={"micro_batch": micro_batch},
    )
    planned = memory.MemoryPlanner(params, tiny, 1, "none").plan(params.distill.gradient_checkpointing)
    assert planned.peak == pytest.approx(measure(params, "allocated"), rel=0.1)


def test_main_memory_is_that_of_the_networks_on_a_cpu_and_of_a_tensor_beside_a_gpu(
    tiny: Architecture, tiny_params: Params
) -> None:
    visiting = {"runtime": {"offload_encoders": True}, "prompts": {"embed": "online"}}
    planner = memory.MemoryPlanner(tiny_params, tiny, 2, "fsdp")
    waiting = memory.MemoryPlanner(changed(tiny_params, **visiting), tiny, 2, "fsdp")
    device = memory.Memory(False, 0, planner._kept(), {"rollout": 5, "optimiser step": 70})
    program = main_memory_module.PROGRAM

    here = main_memory_module.plan_main_memory(planner, device, on_cpu=True)
    networks = sum(device.kept[name] for name in ("teacher", "student", "fake score", "moving average"))
    assert here.start - program == networks
    assert here.training - program == sum(device.kept.values()) + 70
    there = main_memory_module.plan_main_memory(planner, device, on_cpu=False)
    assert there.start == there.training
    assert 0 < there.start - program < networks / 2
    online = main_memory_module.plan_main_memory(waiting, device, on_cpu=False)
    assert online.training - there.training == 4 * tiny.encoder_parameters


@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_decoding_a_picture_is_counted_as_it_runs(
    name: str, tiny_params: Params, tiny_pipeline: Callable[[str], Path]
) -> None:
    folder = tiny_pipeline(name)
    found = planned_pipeline(name, folder, tiny_params)
    weights, peak = plan_decoding(tiny_params, found)
    pipeline = found.family.load_pipeline(folder, text=False, transformer=False)
    latents = torch.randn(1, *found.latent_shape)
    live = LiveBytes([*pipeline.vae.parameters(), *pipeline.vae.buffers(), latents])
    with live:
        found.family.decode(pipeline, latents)
    assert weights == sum(parameter.nbytes for parameter in pipeline.vae.parameters())
    assert peak == pytest.approx(live.peak, rel=0.02)
    half = plan_decoding(changed(tiny_params, latents={"precision": "bf16"}), found)
    assert half[0] == weights // 2
    measured = {"probe": PROBE | {"metrics": ["contrast"]}}
    assert plan_decoding(changed(tiny_params, latents={"precision": "bf16"}, distill=measured), found) == (
        weights,
        peak,
    )
    assert peak / 2 <= half[1] < peak


def test_pictures_while_training_are_planned_where_they_are_drawn(
    one_block: Architecture, tiny_params: Params
) -> None:
    probe = PROBE | {"metrics": ["contrast"]}
    for drawn, changes in (
        (False, {"runtime": {"pictures_every": 0}}),
        (True, {"runtime": {"pictures_every": 5}}),
        (False, {"runtime": {"pictures_every": 0}, "distill": {"probe": PROBE}}),
        (True, {"runtime": {"pictures_every": 0}, "distill": {"probe": probe}}),
    ):
        planner = memory.MemoryPlanner(changed(tiny_params, **changes), one_block, 1, "none")
        assert ("autoencoder, for pictures" in planner._kept()) == drawn


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "distill",
    [{}, {"lora": {"rank": 64, "alpha": 64.0}}],
    ids=["all weights", "LoRA"],
)
def test_planned_main_memory_is_what_processes_take(
    tiny_params: Params, tiny_sd3: Path, tmp_path: Path, distill: dict[str, Any], processes: int
) -> None:
    """At 36 million parameters: what is their own (RssAnon) at the start, and at most in a round."""
    from miniature.teacher import build_transformer

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_sd3, teacher)
    build_transformer(layers=4, heads=8, head_dim=64).save_pretrained(teacher / "transformer")
    params = changed(
        tiny_params,
        teacher={"source": str(teacher)},
        distill={"batch_size": 4, "student_every": 1, "fake_only": 0, "fake_knows_level": False, **distill},
        schedule={"min_len": 1, "max_len": 2},
        runtime={"device": "cpu"},
    )
    (tmp_path / "params.json").write_text(params.model_dump_json())
    environments = watched.processes(processes)
    outs = [tmp_path / f"{rank}.json" for rank in range(processes)]
    start = [sys.executable, "-m", "reference.start", str(tmp_path / "params.json")]
    peaks = watched.watch([[*start, str(out), "1"] for out in outs], environments, Path.cwd())
    sharding: memory.Sharding = "fsdp" if processes > 1 else "none"
    architecture_ = architecture.find(params.teacher, None)
    planned = plan.make_plan(params, architecture_, processes=processes, sharding=sharding).main_memory
    program = main_memory_module.PROGRAM
    for out, peak in zip(outs, peaks, strict=True):
        values = json.loads(out.read_text())
        assert values["before"] < program + 100e6
        assert values["after"] - values["before"] == pytest.approx(planned.start - program, rel=0.1, abs=40e6)
        assert peak.anonymous - values["before"] == pytest.approx(planned.training - program, rel=0.3, abs=60e6)


FLOAT32_STATES = Optimiser(lr=1e-3)
ONE_GRAPH = {"ca": {"weight": 0.0, "scale": 0.0}, "dm": {"weight": 1.0}, "cdm": {"weight": 0.0}}
"""Losses of a student's update with a single forward to learn from, which is the quickest to count."""
PROBE = {"reference": "latents", "every": 10}


def test_8bit_states_take_a_quarter_of_those_that_fit() -> None:
    size = memory.Sizes(
        frozen=0,
        learning=1_000_000,
        tensors=10,
        in_8bit=512_000,
        buffers=0,
        stored=0,
        largest_block=(0, 0),
        outside=(0, 0),
        largest=0,
    )
    small = memory.optimiser_bytes(size, Optimiser(lr=1e-3, states="8bit"))
    assert small == 2 * 512_000 + 2 * 4 * 2_000 + 8 * 488_000 + 40
    assert memory.optimiser_bytes(size, FLOAT32_STATES) == 8 * 1_000_000 + 40


@pytest.mark.slow
def test_memory_follows_the_settings(one_block: Architecture, tiny_params: Params) -> None:
    def planner(
        processes: int = 1, sharding: memory.Sharding = "none", **sections: dict[str, Any]
    ) -> memory.MemoryPlanner:
        sections["distill"] = {"losses": ONE_GRAPH} | sections.get("distill", {})
        return memory.MemoryPlanner(changed(tiny_params, **sections), one_block, processes, sharding)

    # Of what is kept all the time no pass has to be counted.
    size, kept = memory.sizes(one_block), planner()._kept()
    network = 4 * size.learning
    assert kept["student"] == kept["teacher"] == network + 4 * size.buffers
    assert kept["AdamW of student and fake score"] == 2 * memory.optimiser_bytes(size, FLOAT32_STATES)
    half = {"precision": "bf16"}
    assert planner(distill=half)._kept()["teacher"] == kept["teacher"] // 2
    best = planner(distill={"keep": "best", "probe": PROBE})._kept()
    assert sum(best.values()) == sum(kept.values()) + network
    online = planner(prompts={"embed": "online"})._kept()
    assert online["text encoders"] == 4 * one_block.encoder_parameters

    base, smaller = planner().plan(False), planner(runtime={"micro_batch": 12}).plan(False)
    assert base.kept == kept
    assert smaller.activations == base.activations // 4
    assert smaller.peak < base.peak
    # Several processes keep as much, and average their gradients in a copy; each has its share of the batch.
    two = planner(2).plan(False)
    assert two.moments["optimiser step"] == two.activations + 2 * network
    assert two.activations == base.activations // 2
    sharded = planner(2, "fsdp").plan(False)
    assert sharded.kept["moving average"] == network // 2
    assert sharded.kept["AdamW of student and fake score"] == memory.optimiser_bytes(size, FLOAT32_STATES)
    assert sharded.moments["optimiser step"] == sharded.activations + network // 2
    # Sharded weights come in bfloat16, so autocast's copies are not there, nor what float32 norms leave in float32.
    whole, spread = (planner(2, sharding, distill=half)._update(1, False).held for sharding in ("none", "fsdp"))
    assert spread < whole - size.learning
    lora = planner(distill={"lora": {"rank": 3, "alpha": 6.0}}).plan(False)
    adapter = 4 * memory.sizes(one_block.adapted(Lora(rank=3, alpha=6))).learning
    assert lora.kept["teacher, the base of all"] == base.kept["teacher"]
    assert lora.kept["adapters of student and fake score"] == 2 * adapter
    assert lora.moments["optimiser step"] == lora.activations + adapter
    assert lora.activations < base.activations

    consistency = {name: {"weight": 0.0} for name in ("dm", "cdm")} | {"ca": {"weight": 0.0, "scale": 0.0}}
    consistency |= {"consistency": {"weight": 1.0, "step": 0.1}}
    without = planner(distill={"losses": consistency})._kept()
    assert {name for name in base.kept if "fake" in name} == {"fake score", "AdamW of student and fake score"}
    assert not any("fake" in name for name in without)
    assert without["AdamW of student"] == memory.optimiser_bytes(size, FLOAT32_STATES)


@pytest.mark.parametrize(("base", "bits"), [("8bit", 8.13), ("4bit", 4.13)])
def test_a_base_in_fewer_bits_is_counted(base: str, bits: float) -> None:
    """At LongCat-Image's size: nearly all weights are linear layers of blocks."""
    teacher = Teacher(family="longcat", source="meituan-longcat/LongCat-Image", guidance_scale=1)
    found = architecture.find(teacher, 512)
    with torch.device("meta"):
        model = found.build()
    shapes = [(layer.out_features, layer.in_features) for _, _, layer in quantised_layers(model)]
    rounded = sum(math.prod(shape) for shape in shapes)
    assert rounded > 0.98 * found.family.count_parameters(found.configs)
    held = sum(quantised_bytes(shape, base, 2) for shape in shapes)
    assert held == pytest.approx(rounded * bits / 8, rel=0.01)


# The whole plan


def test_a_run_adds_up(tiny: Architecture, tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_passes(monkeypatch)
    params = changed(
        tiny_params,
        distill={
            "iterations": 100, "fake_only": 20, "batch_size": 8, "student_every": 2, "losses": ONE_GRAPH,
        },
    )  # fmt: skip
    made = plan.make_plan(params, tiny, processes=2, peak_flops=1e9, utilisation=0.5)
    assert made.staging == 0
    forward, update = plan.flops(tiny)
    assert update == pytest.approx(3 * forward, rel=0.1)
    flops = 0.0
    for rounds, learns in ((10, False), (40, True)):
        calls = forwards.forwards_of_round(params.distill, params.schedule, 3.0, learns=learns)
        flops += rounds * 8 * (calls.plain * forward + calls.with_graph * update)
    assert made.compute.run_flops == pytest.approx(flops)
    assert made.compute.seconds == pytest.approx(flops / (2 * 1e9 * 0.5))
    assert made.batch == 4
    checkpointed = plan.flops(tiny, checkpointing=True)
    assert checkpointed[0] == forward
    assert update < checkpointed[1] < update + forward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 5}, "distill.batch_size 48 does not divide over 5 processes"),
        ({"processes": 0}, "--processes is 0"),
        ({"peak_flops": 0.0}, "--flops is 0"),
        ({"utilisation": 1.5}, "--utilisation is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(
    tiny: Architecture, tiny_params: Params, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CdmError, match=message):
        plan.make_plan(tiny_params, tiny, **options)


def test_stored_prompts_are_those_of_the_lists(tiny_params: Params) -> None:
    cached, seed = tiny_params.prompts, tiny_params.seed
    assert plan.stored_prompts(cached, seed) == 1 + 3 + 5  # the empty one, evaluation, training
    assert plan.stored_prompts(cached.model_copy(update={"embed": "online"}), seed) == 1 + 3
    assert plan.stored_prompts(cached.model_copy(update={"train": ["nowhere.txt"]}), seed) is None


# The command


def run_plan(params: Params, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    YAML().dump(json.loads(params.model_dump_json()), path)
    monkeypatch.setattr(sys, "argv", ["cdm", "plan", str(path), *options])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code


def test_the_command_prints_a_table_and_json(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = changed(tiny_params, distill={"gradient_checkpointing": True, "losses": ONE_GRAPH})
    run_plan(params, tmp_path / "params.yaml", monkeypatch, "--processes", "2", "--flops", "1e12", "--json")
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] == 23_792
    assert values["batch"] == 24
    assert values["memory"]["checkpointing"]
    memory_now = values["memory"]
    assert memory_now["peak"] == sum(memory_now["kept"].values()) + max(memory_now["moments"].values())
    assert memory_now["peak"] < values["memory_otherwise"]["peak"]
    leave_out_passes(monkeypatch)
    more = ["--processes", "2", "--sharding", "fsdp", "--flops", "1e12"]
    run_plan(params, tmp_path / "params.yaml", monkeypatch, *more)
    out = capsys.readouterr().out
    assert "23,792 parameters, all learn, fp32" in out
    assert "2 processes, sharded (FSDP2), 24 samples each, 24 at once" in out
    assert "embeddings of 9 prompts" in out


def test_the_command_refuses_in_a_line(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    YAML().dump(json.loads(tiny_params.model_dump_json()), tmp_path / "params.yaml")
    monkeypatch.setattr(sys, "argv", ["cdm", "plan", str(tmp_path / "params.yaml"), "--processes", "7"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: distill.batch_size 48 does not divide over 7 processes\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (81.1e9, "81.1 GB"), (2e13, "20,000 GB")],
)
def test_sizes_are_readable(value: float, text: str) -> None:
    assert tables._bytes(value) == text
