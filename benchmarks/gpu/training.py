"""Training at the scale's size: iterations of ours and of the plain order, memory, the share of each part, settings.

Weights and prompts are random; the code is the training's own: its networks, its learners, its round. Both orders
run the same rounds on the same random numbers, on the same networks, ours first, after a round that does not count. The
rounds are those of a seed whose numbers of forwards are near the mean, because few are timed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu import clock
from benchmarks.gpu.clock import Stopwatch
from benchmarks.gpu.scale import Scale
from cdm.params import Params, Schedule
from cdm.planning.forwards import mean_depth
from cdm.randomness import Draws
from cdm.rollout import Conditioning
from cdm.schedule import draw_rollouts
from cdm.training import checkpoint, terms
from cdm.training import distiller as engine
from cdm.training.compiling import compile_blocks
from cdm.training.distiller import Distiller
from cdm.training.networks import FullNetworks, LoraNetworks, Networks, Role, Trained
from cdm.training.state import TrainingState
from reference.plain import PlainDistiller

LORA, FULL = "sd3-medium-lora-80gb", "sd3-medium"
Step = TypeVar("Step", Distiller, PlainDistiller)
SEEDS = 100
"""Seeds of which the one with the most usual rounds is taken."""


class Meter:
    """Networks that count the samples that they are asked about, by role, apart for those with a graph."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self.samples: Counter[str] = Counter()

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with_graph = role != "teacher" and torch.is_grad_enabled()
        self.samples["with_graph" if with_graph else "plain"] += len(x)
        return self.networks.velocity(role, x, sigma, conditioning)

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return self.networks.parameters(role)

    def casting_once(self) -> AbstractContextManager[object]:
        return self.networks.casting_once()

    def backward(self, role: Trained, loss: Tensor) -> None:
        self.networks.backward(role, loss)

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        self.networks.save_student(weights, source, folder)


class World:
    """Networks with random weights on the device, their learners, and a batch of random prompts."""

    def __init__(self, scale: Scale, params: Params) -> None:
        self.scale, self.params, self.device = scale, params, scale.torch_device
        distill = params.distill
        options: dict[str, Any] = {
            "autocast": torch.bfloat16 if distill.precision == "bf16" else None,
            "gradient_checkpointing": distill.gradient_checkpointing,
        }
        family = scale.architecture.family
        if distill.lora is None:
            self.networks: Any = FullNetworks(family, scale.transformer(), **options)
        else:
            teacher = scale.transformer(options["autocast"] or torch.float32)
            self.networks = LoraNetworks(family, teacher, distill.lora, seed=0, **options)
        self.meter = Meter(self.networks)
        self.state = TrainingState.start(self.meter, distill)
        self.conditioning, self.empty = scale.conditioning(distill.batch_size), scale.conditioning(1)
        self.seed = typical_seed(
            params.schedule, scale.architecture.shift, distill.batch_size, distill.student_every, scale.rounds
        )

    @property
    def models(self) -> list[nn.Module]:
        """The modules behind the roles."""
        return (
            list(self.networks.models.values()) if hasattr(self.networks, "models") else [self.networks.model]
        )

    def distiller(self, kind: type[Step], rollouts: str = "shared") -> Step:
        """A training step on these networks."""
        networks: Networks = self.meter
        return kind(
            networks,
            self.state.student,
            self.state.fake,
            distill=self.params.distill.model_copy(update={"rollouts": rollouts}),
            schedule=self.params.schedule,
            shift=self.scale.architecture.shift,
            seed=self.seed,
            prompts=lambda _, samples: {
                name: value[list(samples)] for name, value in self.conditioning.items()
            },
            empty=self.empty,
            latent_shape=self.scale.architecture.latent_shape,
            samples=range(self.params.distill.batch_size),
            device=self.device,
        )

    def warm_up(self, distiller: Distiller | PlainDistiller) -> None:
        """A round with the shortest rollouts, in which libraries load and optimisers make their states."""
        distiller.schedule = self.params.schedule.model_copy(
            update={"max_len": self.params.schedule.min_len + 1}
        )
        distiller.round(0)
        self.state.update_average(self.params.distill.ema)
        distiller.schedule = self.params.schedule

    def round(self, distiller: Distiller | PlainDistiller, number: int) -> None:
        """A round as training has it."""
        distiller.round(number * self.params.distill.student_every)
        self.state.update_average(self.params.distill.ema)


def typical_seed(schedule: Schedule, shift: float, batch: int, every: int, rounds: int) -> int:
    """The seed whose first rounds have about as many steps to the anchors, and to the ends, as the mean has."""
    depth, length = mean_depth(schedule), (schedule.min_len + schedule.max_len) / 2

    def distance(seed: int) -> float:
        depths: list[int] = []
        lengths: list[int] = []
        for iteration in range(rounds * every):
            rollouts = draw_rollouts(schedule, shift, Draws(seed, iteration, range(batch)))
            lengths += (rollouts.sigmas > 0).sum(1).tolist()
            if iteration % every == 0:
                depths += rollouts.depth
        return abs(sum(depths) / len(depths) - depth) + abs(sum(lengths) / len(lengths) - length)

    return min(range(SEEDS), key=distance)


def measure_lora(scale: Scale, note: Any) -> None:
    """Iterations of a LoRA, and a checkpoint of it."""
    world = World(scale, scale.params(LORA))
    compare(world, note)
    note(checkpoint=time_checkpoint(world))


def measure_full(scale: Scale, note: Any) -> None:
    """Iterations of all weights, with 8-bit optimiser states."""
    states = "8bit" if find_spec("bitsandbytes") else "fp32"
    note(states=states)
    compare(World(scale, scale.params(FULL, states)), note)


def measure_allocator(scale: Scale, note: Any) -> None:
    """Ours alone, for another setting of the allocator in the environment."""
    world = World(scale, scale.params(LORA))
    distiller = world.distiller(Distiller)
    world.warm_up(distiller)
    note(batch=scale.batch, ours=time_rounds(world, distiller))


def compare(world: World, note: Any) -> None:
    """Seconds and memory of ours and of the plain order, and the share of each part of ours."""
    every = world.params.distill.student_every
    note(
        batch=world.params.distill.batch_size,
        rounds=world.scale.rounds,
        iterations_a_round=every,
        seed=world.seed,
        learning=sum(value.numel() for value in world.state.student.parameters.values()),
        resident=torch.cuda.memory_allocated() if world.device.type == "cuda" else None,
    )
    ours = world.distiller(Distiller)
    note(first_round=clock.seconds_of(lambda: world.warm_up(ours), world.device))
    note(ours=time_rounds(world, ours))
    note(parts=time_parts(world, ours))
    note(plain=time_rounds(world, world.distiller(PlainDistiller, "fresh")))


def time_rounds(world: World, distiller: Distiller | PlainDistiller) -> dict[str, Any]:
    """Seconds an iteration, samples by kind of forward an iteration, and the peak of the memory."""
    every = world.params.distill.student_every
    clock.forget_peak(world.device)
    world.meter.samples.clear()
    seconds = [
        clock.seconds_of(partial(world.round, distiller, number), world.device)
        for number in range(world.scale.rounds)
    ]
    iterations = world.scale.rounds * every
    return {
        "seconds": sum(seconds) / iterations,
        "rounds": seconds,
        "samples": {name: count / iterations for name, count in world.meter.samples.items()},
        "peak": clock.peak(world.device),
    }


def time_parts(world: World, distiller: Distiller) -> dict[str, float]:
    """Seconds of each part of a round of ours, with a wait for the device around each."""
    watch = Stopwatch(world.device)
    with watching(watch, distiller, world), watch.part("rest"):
        world.round(distiller, 0)
    return dict(watch.seconds)


@contextmanager
def watching(watch: Stopwatch, distiller: Distiller, world: World) -> Iterator[None]:
    """Counts the parts of a round to the watch."""
    parts: list[tuple[Any, str, Any]] = [
        (distiller, "roll_out", "rollout"),
        (distiller, "predict", "student at the anchor"),
        (terms, "extrapolate", "student off the trajectory"),
        (distiller, "ask", lambda role, *_: f"questions to the {role}"),
        (world.meter, "backward", lambda role, *_: f"backward of the {role}"),
        (world.state.student, "step", "optimiser"),
        (world.state.fake, "step", "optimiser"),
        (world.state, "update_average", "moving average"),
        (engine, "blend", "mixing into the fake score"),
        (Draws, "normal", "random numbers"),
    ]
    with ExitStack() as stack:
        for owner, name, title in parts:
            function = getattr(owner, name)
            if owner is Draws:
                wrapped = _method(watch, title, function)
            else:
                wrapped = watch.around(title, function)
            stack.enter_context(patch.object(owner, name, wrapped))
        velocity = world.meter.velocity

        def timed(role: Role, *args: Any) -> Tensor:
            if role == "fake" and torch.is_grad_enabled():
                with watch.part("fake score's forward"):
                    return velocity(role, *args)
            return velocity(role, *args)

        stack.enter_context(patch.object(world.meter, "velocity", timed))
        yield


def _method(watch: Stopwatch, title: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a class, its time counted."""

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watch.part(title):
            return function(self, *args, **kwargs)

    return timed


def time_checkpoint(world: World) -> dict[str, float]:
    """Seconds to write a checkpoint and to go on from it, and its bytes."""
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        checkpoint.save(folder, world.state.checkpoint())
        written = time.perf_counter()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        saved = checkpoint.load_newest(folder)
        assert saved is not None
        world.state.restore(saved)
        read = time.perf_counter()
    finally:
        shutil.rmtree(folder)
    return {"bytes": size, "write": written - start, "read": read - written}


# Single forwards and updates: which settings pay.


class Calls:
    """A forward, and a forward with its backward, of some samples of the student."""

    def __init__(self, world: World) -> None:
        self.world = world

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
        device, shape = self.world.device, self.world.scale.architecture.latent_shape
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(batch, *shape, generator=generator, device=device)
        sigma = torch.linspace(0.2, 0.9, batch, device=device)
        return (
            x,
            sigma,
            {name: v[:1].repeat_interleave(batch, 0) for name, v in self.world.conditioning.items()},
        )

    def forward(self, batch: int) -> None:
        x, sigma, conditioning = self.inputs(batch)
        with torch.no_grad():
            self.world.networks.velocity("student", x, sigma, conditioning)

    def update(self, batch: int) -> None:
        x, sigma, conditioning = self.inputs(batch)
        velocity = self.world.networks.velocity("student", x, sigma, conditioning)
        self.world.networks.backward("student", velocity.square().mean())
        for value in self.world.networks.parameters("student").values():
            value.grad = None

    def both(self, batch: int) -> None:
        self.forward(batch)
        self.update(batch)

    def time(self, batch: int, what: Sequence[str] = ("forward", "update")) -> dict[str, Any]:
        """Seconds a sample of each, and the peak of the memory; or that the memory does not suffice."""
        device, repeats = self.world.device, self.world.scale.repeats
        clock.forget_peak(device)
        try:
            seconds = {
                name: clock.median_seconds(partial(getattr(self, name), batch), device, repeats) / batch
                for name in what
            }
        except torch.OutOfMemoryError:
            for value in self.world.networks.parameters("student").values():
                value.grad = None
            return {"batch": batch, "out_of_memory": True}
        return {"batch": batch, **seconds, "peak": clock.peak(device)}


def measure_settings(scale: Scale, note: Any) -> None:
    """Micro-batches, gradient checkpointing, TF32: single forwards and updates of a LoRA."""
    world = World(scale, scale.params(LORA))
    calls = Calls(world)
    rows: list[dict[str, Any]] = []
    for checkpointing in (True, False):
        set_checkpointing(world, checkpointing)
        for batch in scale.micro_batches:
            row = {"gradient_checkpointing": checkpointing, **calls.time(batch)}
            note(micro_batches=[*rows, row])
            rows.append(row)
            if "out_of_memory" in row:
                break
    set_checkpointing(world, True)
    batch = scale.micro_batches[0]
    tf32: list[dict[str, Any]] = []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", None)):
        if dtype is None:
            for model in world.models:
                model.float()
        world.networks.autocast = dtype
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            tf32.append({"precision": precision, "tf32": allowed, **calls.time(batch)})
            note(tf32=tf32)
    torch.backends.cuda.matmul.allow_tf32 = False


def measure_compile(scale: Scale, note: Any) -> None:
    """Single forwards and updates, as they are and with each transformer block compiled."""
    world = World(scale, scale.params(LORA))
    calls = Calls(world)
    rows: list[dict[str, Any]] = []
    note(batch=scale.compile_batch)
    for compiled in (False, True):
        if compiled:
            compile_all(world)
        for checkpointing in (True, False):
            set_checkpointing(world, checkpointing)
            first = clock.seconds_of(lambda: calls.both(scale.compile_batch), world.device)
            row = {"compiled": compiled, "gradient_checkpointing": checkpointing, "first": first}
            rows.append(row | calls.time(scale.compile_batch))
            note(calls=rows)


def measure_compiled_round(scale: Scale, note: Any) -> None:
    """A round of ours, as it is and with each transformer block compiled: the first time and again.

    The first takes minutes where roles are adapters of one model, because each has its own compiled code.
    """
    world = World(scale, scale.params(LORA))
    distiller = world.distiller(Distiller)
    world.warm_up(distiller)
    note(batch=scale.batch)
    rounds: list[float] = []
    for _ in range(2):
        rounds.append(clock.seconds_of(lambda: world.round(distiller, 0), world.device))
        note(round=min(rounds))
    compile_all(world)
    note(first_compiled_round=clock.seconds_of(lambda: world.round(distiller, 0), world.device))
    compiled: list[float] = []
    for _ in range(2):
        compiled.append(clock.seconds_of(lambda: world.round(distiller, 0), world.device))
        note(compiled_round=min(compiled), peak=clock.peak(world.device))


def compile_all(world: World) -> None:
    """Has each transformer block compiled when it is called."""
    for model in world.models:
        compile_blocks(model, world.scale.compile_backend)


def set_checkpointing(world: World, on: bool) -> None:
    """Turns gradient checkpointing on or off."""
    for model in world.models:
        switch: Any = model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing
        switch()
