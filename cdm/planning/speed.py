"""The speed of this machine's CPU at a training, measured on the transformer with random weights for about a second.

Where the whole transformer would take longer, or more memory than is free, a smaller one is measured: fewer samples at
once, two blocks of each kind, fewer latents and text tokens, in this order. Its time is scaled by FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cdm.families.configs import TRANSFORMER, read_config
from cdm.params import Params
from cdm.planning.architecture import FLOAT32, Architecture
from cdm.planning.footprint import Network
from cdm.planning.memory import as_learner, at_once
from cdm.planning.plan import Speed, flops
from cdm.system import host
from cdm.system.device import choose_device

SECONDS = 0.5
"""For which each of the two passes is repeated."""
LONGEST = 1.0
"""Seconds that one pass of each may take together, as estimated, before something smaller is measured."""
MEMORY = 0.5
"""Share of the free memory that is taken."""
BLOCKS = 2
"""Blocks of each kind that a smaller transformer has."""
SMALLEST = 4, 16
"""Latents on a side, and text tokens, below which nothing is made smaller."""


def is_for_cpu(device: str) -> bool:
    """Whether a training with this `runtime.device` would run on the CPU of this machine."""
    return device in ("auto", "cpu") and choose_device(device).type == "cpu"


def measure(params: Params, architecture: Architecture, processes: int = 1) -> Speed | None:
    """The speed of the training of `params` on this machine's CPU; None where `runtime.device` is not the CPU here.

    `processes` share the machine as they share the batch. Raises CdmError if the batch does not divide over them.
    """
    if not is_for_cpu(params.runtime.device):
        return None
    most = at_once(params, processes)
    host.prepare(params.runtime.threads)
    checkpointing, bf16 = params.distill.gradient_checkpointing, params.distill.precision == "bf16"
    autocast, rate, threads = torch.bfloat16 if bf16 else None, matrix_rate(), torch.get_num_threads()
    whole = as_learner(params.distill, architecture)
    total = flops(whole, checkpointing=checkpointing)
    for learner, samples, scaled in smaller(whole, most):
        counted = total if scaled is None else flops(learner, checkpointing=checkpointing)
        quick = samples * sum(counted) / rate <= LONGEST
        room = quick and has_room(learner, samples, autocast)
        if room:
            break
    if not room and (quick or not has_room(learner, samples, autocast)):
        return Speed(total[0] / rate, total[1] / rate, threads, 1, "a product of matrices")
    forward, update, worked = time_passes(learner, samples, autocast, checkpointing)
    return Speed(
        forward=forward / samples * total[0] / counted[0],
        update=update / samples * total[1] / counted[1],
        threads=threads,
        samples=samples,
        scaled=scaled,
        share=min(worked / (threads * update), 1.0),
    )


def smaller(whole: Architecture, samples: int) -> Iterator[tuple[Architecture, int, str | None]]:
    """The transformer, the number of samples at once and what is smaller about it: from the whole on, ever smaller."""
    while samples > 1:
        yield whole, samples, None
        samples = -(-samples // 2)
    yield whole, 1, None
    learner, blocks = _with_few_blocks(whole)
    while True:
        height, width = learner.latent_shape[-2:]
        tokens = max((shape[0] for shape in learner.text_shapes.values() if len(shape) > 1), default=0)
        text = f" and {tokens} text tokens" if tokens else ""
        yield learner, 1, f"{blocks} on {height} x {width} latents{text}"
        least = _smaller_inputs(learner)
        if least == learner:
            return
        learner = least


def _with_few_blocks(whole: Architecture) -> tuple[Architecture, str]:
    """The architecture with at most `BLOCKS` of each kind of block, and how many of how many these are."""
    config = read_config(whole.configs, TRANSFORMER)
    blocks = {
        name: value for name, value in config.items() if name.endswith("layers") and isinstance(value, int)
    }
    few = {name: min(value, BLOCKS) for name, value in blocks.items()}
    reduced = replace(whole, configs={TRANSFORMER: config | few})
    return reduced, f"{sum(few.values())} of {sum(blocks.values())} blocks"


def _smaller_inputs(learner: Architecture) -> Architecture:
    """Half the latents on a side and half the text, or what is left of it."""

    def half(value: int, least: int) -> int:
        return max(value // 4 * 2, least) if value > least else value

    side, tokens = SMALLEST
    channels, *sizes = learner.latent_shape
    texts = {
        name: (half(shape[0], tokens), *shape[1:]) if len(shape) > 1 else shape
        for name, shape in learner.text_shapes.items()
    }
    return replace(learner, latent_shape=(channels, *(half(size, side) for size in sizes)), text_shapes=texts)


def matrix_rate() -> float:
    """FLOP/s of a product of two matrices of moderate size: what no network does better."""
    size = 512
    x = torch.rand(size, size)
    return 2 * size**3 / min(_repeat(lambda: x @ x, SECONDS / 10))[0]


def has_room(learner: Architecture, samples: int, autocast: torch.dtype | None) -> bool:
    """Whether the weights and an update of so many samples, with its gradients, fit into the memory that is free."""
    network = Network.from_architecture(learner, autocast=autocast, cuda=False)
    weights = sum(FLOAT32 * parameter.numel() for parameter in network.model.parameters())
    return weights + network.update(1, samples).peak <= MEMORY * host.free_memory()


def time_passes(
    learner: Architecture, samples: int, autocast: torch.dtype | None, checkpointing: bool
) -> tuple[float, float, float]:
    """Seconds of a forward without a graph, of a forward with its backward, of so many samples, and the seconds of
    processors in the latter.

    The fastest of each: that is the one which other work on the machine has disturbed least.
    """
    model = learner.build().eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:  # what is frozen has the type in which it runs, as in the training
            parameter.data = parameter.data.to(autocast or torch.float32)
    inputs = {
        name: torch.rand_like(value) if value.is_floating_point() else torch.zeros_like(value)
        for name, value in learner.inputs(samples).items()
    }

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return learner.velocity(model, inputs).float()

    def forward() -> None:
        with torch.no_grad():
            run()

    def update() -> None:
        run().square().mean().backward()
        model.zero_grad()

    seconds, _ = min(_repeat(forward, SECONDS))
    if checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    return seconds, *min(_repeat(update, SECONDS))


def _repeat(run: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """Seconds of each of several runs, and of processors in it, for so long and at least one, after a first one that
    does not count."""
    run()
    times: list[tuple[float, float]] = []
    while not times or sum(elapsed for elapsed, _ in times) < seconds:
        start, worked = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - start, time.process_time() - worked))
    return times
