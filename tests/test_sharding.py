"""FSDP2 over two processes on the CPU: the losses and the student of one process, and checkpoints that all can read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from cdm.models.manifest import describe
from cdm.params import Params, load
from cdm.training import checkpoint
from cdm.training.inputs import Inputs
from cdm.training.loop import distill
from cdm.training.watch import Places
from tests.crashing import crash_rounds
from tests.inputs import build_prompts, cache_latents
from tests.launching import in_two_processes, succeed_in_two_processes
from tests.test_training import read_log
from tests.write_params import write_params

ADAPTER = {"rank": 4, "alpha": 8}
LOSSES = ("loss_fake", "loss_dm", "loss_ca", "loss_cdm", "grad_norm_fake", "grad_norm_student")
FULL, LORA = (
    "student/transformer/diffusion_pytorch_model.safetensors",
    "student/pytorch_lora_weights.safetensors",
)


class World:
    """A distillation of the tiny teacher that can be run in one process or in two, and crash; perhaps `watched`."""

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        watched: bool = False,
        runtime: dict[str, Any] | None = None,
        embed: str = "cached",
        **distill_changes: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        settings = {"iterations": 8, "fake_only": 2, **distill_changes}
        if watched:
            settings["probe"] = {"reference": "latents", "every": 4, "samples": 6, "steps": [1, 2]}
        values = write_params(folder, teacher, **settings).model_dump(mode="json")
        values["runtime"] |= runtime or {}
        values["prompts"]["embed"] = embed
        if watched:
            values["prompts"]["eval_count"] = 2
            values["latents"]["per_prompt"] = 3
            values["runtime"]["pictures_every"] = 4
        YAML().dump(values, folder / "params.yaml")
        self.params: Params = load(folder / "params.yaml")
        self.manifest = describe("sd3", str(teacher), None)
        self.manifest.write(folder / "teacher.json")
        build_prompts(self.params, self.manifest, folder / "prompts")
        if watched:
            cache_latents(self.params, self.manifest, folder / "prompts", folder / "latents")

    def alone(self, out: Path) -> None:
        inputs = Inputs.gather(self.params, self.manifest, self.folder / "prompts")
        places = Places(out / "pictures", out / "timing.json", out / "trackers")
        student, log = out / "student", out / "log.csv"
        distill(self.params, inputs, checkpoints=out / "ck", student=student, log=log, places=places)

    def shared(self, out: Path) -> None:
        """Each of the two holds everything."""
        succeed_in_two_processes("tests.run_distill", self.folder, out, out / "ck")

    def sharded(self, out: Path, crash_at: int = 0) -> None:
        arguments = (self.folder, out, out / "ck", str(crash_at))
        # The last would have one process alone read weights, in what loads them as transformers does.
        launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        for code, errors in in_two_processes("tests.run_sharded", *arguments, **launched):
            assert code == (1 if crash_at else 0), errors
            assert ("crash" in errors) == bool(crash_at), errors


def assert_alike(mine: Path, theirs: Path, weights: str = FULL, rel: float = 2e-3, atol: float = 2e-3) -> None:
    """To rounding: sums over processes are in another order than sums over a batch."""
    one, two = read_log(theirs), read_log(mine)
    assert [row["iteration"] for row in two] == [row["iteration"] for row in one]
    for my_row, their_row in zip(two, one, strict=True):
        for name in LOSSES:
            assert bool(my_row[name]) == bool(their_row[name])
            if their_row[name]:
                assert float(my_row[name]) == pytest.approx(float(their_row[name]), rel=rel), name
    my_weights, their_weights = load_file(mine / weights), load_file(theirs / weights)
    assert my_weights.keys() == their_weights.keys()
    for name, value in their_weights.items():
        torch.testing.assert_close(my_weights[name], value, atol=atol, rtol=1e-2)


@pytest.fixture(scope="module")
def world(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), tiny_sd3)


@pytest.fixture(scope="module")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process makes of it."""
    out = tmp_path_factory.mktemp("one")
    world.alone(out)
    return out


def test_one_process_goes_on_where_two_sharded_ones_stopped(world: World, one: Path, tmp_path: Path) -> None:
    world.sharded(tmp_path, crash_at=6)
    (folder,) = (tmp_path / "ck").iterdir()
    saved = checkpoint.load_newest(folder)
    assert saved is not None
    assert saved.step == 4
    shapes = {name: value.shape for name, value in load_file(one / FULL).items()}
    for group in ("student", "fake", "average"):
        whole = {name: value.shape for name, value in saved.tensors[group].items()}
        assert whole
        assert whole.items() <= shapes.items()
    world.alone(tmp_path)
    assert_alike(tmp_path, one)


@pytest.mark.slow
def test_two_sharded_processes_go_on_where_one_stopped(
    world: World, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_rounds(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="crash 6"):
        world.alone(tmp_path)
    world.sharded(tmp_path)
    assert_alike(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_is_sharded_too(tiny_sd3: Path, tmp_path: Path, gradient_checkpointing: bool) -> None:
    """One frozen model with two adapters; a student's graph waits while the fake score learns in the same model."""
    changes = {"iterations": 8, "lora": ADAPTER, "gradient_checkpointing": gradient_checkpointing}
    changes |= {"fake_knows_level": gradient_checkpointing}  # in one of the two
    world = World(tmp_path / "world", tiny_sd3, **changes)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two")
    assert_alike(tmp_path / "two", tmp_path / "one", LORA)


def test_weights_are_gathered_in_bf16_and_held_in_float32() -> None:
    succeed_in_two_processes("tests.run_bf16")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, ADAPTER])
def test_bf16_travels_in_bf16_and_learns_in_float32(
    tiny_sd3: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """As with autocast in one process, to the rounding of bfloat16. `tests.run_sharded` looks at the types."""
    world = World(tmp_path / "world", tiny_sd3, iterations=8, precision="bf16", lora=lora)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two")
    assert_alike(tmp_path / "two", tmp_path / "one", FULL if lora is None else LORA, rel=0.05, atol=6e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, ADAPTER])
def test_sharded_ones_are_probed_and_shown_as_one_process_is(
    tiny_sd3: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """Both exchange the parameters of the sharded student with its average, and back."""
    world = World(tmp_path / "world", tiny_sd3, watched=True, iterations=8, lora=lora)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two")
    assert_alike(tmp_path / "two", tmp_path / "one", FULL if lora is None else LORA)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [row["iteration"] for row in two if row["probe"]] == ["4", "8"]
    for mine, theirs in zip(two, one, strict=True):
        if theirs["probe"]:
            for name in ("probe_steps1", "probe_steps2", "probe"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=2e-3)
    pictures = [sorted(path.name for path in (tmp_path / out / "pictures").iterdir()) for out in ("one", "two")]
    assert pictures[0] == pictures[1]
    assert "iteration-000008.png" in pictures[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("sharded", {}),
        ("sharded", {"lora": ADAPTER}),
        ("sharded", {"lora": ADAPTER, "precision": "bf16"}),
        ("sharded", {"precision": "bf16", "gradient_checkpointing": True}),
        ("shared", {"lora": ADAPTER}),
        ("shared", {}),
    ],
)
def test_a_fake_score_that_knows_the_level_learns_in_two_processes_as_in_one(
    tiny_sd3: Path, tmp_path: Path, how: str, changes: dict[str, Any]
) -> None:
    """The map from the level lies beside weights that are sharded, or whole in both; it is in the checkpoint."""
    world = World(tmp_path / "world", tiny_sd3, iterations=8, fake_knows_level=True, **changes)
    world.alone(tmp_path / "one")
    getattr(world, how)(tmp_path / "two")
    rounded = {"rel": 0.2, "atol": 6e-3} if "precision" in changes else {}
    assert_alike(tmp_path / "two", tmp_path / "one", LORA if "lora" in changes else FULL, **rounded)
    maps = []
    for out in ("one", "two"):
        (folder,) = (tmp_path / out / "ck").iterdir()
        saved = checkpoint.load_newest(folder)
        assert saved is not None
        maps.append({name: value for name, value in saved.tensors["fake"].items() if name.startswith("level.")})
    assert maps[0].keys() == {"level.weight", "level.bias"}
    for name, value in maps[0].items():
        assert value.any(), "it has learnt"
        torch.testing.assert_close(maps[1][name], value, atol=rounded.get("atol", 2e-3), rtol=1e-2)


# What the recipes of real teachers put together

COMBINED: dict[str, Any] = {
    "precision": "bf16",
    "gradient_checkpointing": True,
    "merge": 0.001,
    "iterations": 8,
}
STATES = {
    "student": {"lr": 1e-3, "warmup": 4, "states": "8bit"},
    "fake": {"lr": 1e-3, "warmup": 4, "states": "8bit"},
}
UNEVEN = {"batch_size": 10, "runtime": {"micro_batch": 3}}
"""Five samples a process, in parts of three and two."""


@pytest.fixture(scope="module")
def wider_sd3(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for states of 8 bits, of its weights and of adapters."""
    from miniature.teacher import build_transformer

    teacher = tmp_path_factory.mktemp("wider") / "teacher"
    shutil.copytree(tiny_sd3, teacher)
    build_transformer(layers=2, heads=16, head_dim=16).save_pretrained(teacher / "transformer")
    return teacher


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("lora", [None, {"rank": 64, "alpha": 128}])
@pytest.mark.parametrize(
    "changes", [{}, UNEVEN, STATES, UNEVEN | STATES], ids=["plain", "parts", "8bit", "both"]
)
def test_what_recipes_put_together_is_that_of_one_process(
    wider_sd3: Path, tmp_path: Path, lora: dict[str, int] | None, changes: dict[str, Any]
) -> None:
    """Sharded, in bf16, with gradient checkpointing; stopped on the way, and taken up again by two processes."""
    if "student" in changes:
        pytest.importorskip("bitsandbytes")
    world = World(tmp_path / "world", wider_sd3, lora=lora, **COMBINED, **changes)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two", crash_at=6)
    world.sharded(tmp_path / "two")
    assert_alike(tmp_path / "two", tmp_path / "one", FULL if lora is None else LORA, rel=0.05, atol=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, ADAPTER])
def test_the_best_by_the_probe_is_kept_sharded_too(
    tiny_sd3: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    world = World(tmp_path / "world", tiny_sd3, watched=True, lora=lora, keep="best", **COMBINED, **UNEVEN)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two")
    first, second = (
        [float(row["probe"]) for row in read_log(tmp_path / out) if row["probe"]] for out in ("one", "two")
    )
    assert len(first) == 2
    assert second == pytest.approx(first, rel=0.02)
    for out, probes in (("one", first), ("two", second)):
        (folder,) = (tmp_path / out / "ck").iterdir()
        saved = checkpoint.load_newest(folder)
        assert saved is not None
        best, average = saved.tensors["best"], saved.tensors["average"]
        student = load_file(tmp_path / out / (FULL if lora is None else LORA))
        kept = {name.removeprefix("transformer."): value for name, value in student.items()}
        strength = {
            name: 2 if ".lora_B." in name else 1 for name in best
        }  # alpha over rank, which is in the file
        assert all(torch.equal(kept[name], strength[name] * value) for name, value in best.items())
        assert all(torch.equal(average[name], value) for name, value in best.items()) == (probes[1] < probes[0])


@pytest.mark.slow
def test_prompts_are_encoded_while_two_sharded_processes_train(tiny_sd3: Path, tmp_path: Path) -> None:
    """Each encodes those of its own samples, and its encoders come and go."""
    online = {"micro_batch": 1, "offload_encoders": True}
    world = World(tmp_path / "world", tiny_sd3, embed="online", runtime=online, iterations=8)
    world.alone(tmp_path / "one")
    world.sharded(tmp_path / "two")
    assert_alike(tmp_path / "two", tmp_path / "one")
    stored = World(tmp_path / "stored", tiny_sd3, iterations=8)
    stored.alone(tmp_path / "cached")
    assert_alike(tmp_path / "two", tmp_path / "cached")
