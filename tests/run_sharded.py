"""A sharded distillation in a process of its own: `python -m tests.run_sharded WORLD OUT CHECKPOINTS CRASH_AT`.

Like tests.run_distill, but it looks at what the process holds and gathers, and crashes at an iteration, if one is
given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdm.models.manifest import TeacherManifest
from cdm.params import load
from cdm.training import setup
from cdm.training.distiller import Distiller, Metrics
from cdm.training.inputs import Inputs
from cdm.training.loop import distill
from cdm.training.sharding import is_sharded
from cdm.training.watch import Places


class Watched(Distiller):
    crash_at = 0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.gathered: set[torch.dtype] = set()
        networks: Any = getattr(arguments[0], "networks", arguments[0])  # of a level-aware fake score
        models = networks.models.values() if hasattr(networks, "models") else [networks.model]
        for layer in (
            module for model in models for module in model.modules() if isinstance(module, nn.Linear)
        ):
            layer.register_forward_pre_hook(lambda layer, _: self.gathered.add(layer.weight.dtype))

    def round(self, iteration: int) -> Metrics:
        if self.crash_at and iteration == self.crash_at:
            sys.exit("crash")
        metrics = super().round(iteration)
        assert self.gathered == {torch.bfloat16 if self.distill.precision == "bf16" else torch.float32}
        for learner in (self.student, self.fake):
            held = [*learner.parameters.values(), *learner.state().values()]
            sharded = [tensor for tensor in held if tensor.ndim]
            assert all(is_sharded(tensor) for tensor in sharded)
            small = {torch.uint8} if learner.settings.states == "8bit" else set()
            assert {tensor.dtype for tensor in sharded} == {torch.float32} | small
            here = sum(tensor.to_local().numel() for tensor in sharded)
            everywhere = sum(tensor.numel() for tensor in sharded)
            assert here < 0.7 * everywhere, f"{here} of {everywhere} numbers are here"
        return metrics


if __name__ == "__main__":
    world, out, checkpoints = (Path(argument) for argument in sys.argv[1:4])
    Watched.crash_at = int(sys.argv[4])
    params = load(world / "params.yaml")
    inputs = Inputs.gather(params, TeacherManifest.read(world / "teacher.json"), world / "prompts")
    setup.Distiller = Watched
    places = Places(out / "pictures", out / "timing.json", out / "trackers")
    distill(
        params, inputs, checkpoints=checkpoints, student=out / "student", log=out / "log.csv", places=places
    )
