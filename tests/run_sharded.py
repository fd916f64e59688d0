"""A sharded distillation in a process of its own: `python -m tests.run_sharded WORLD OUT CHECKPOINTS CRASH_AT`.

Like tests.run_distill, but it looks at what the process holds, and crashes at an iteration, if one is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cdm.distiller import Distiller, Metrics
from cdm.hub import TeacherManifest
from cdm.params import load
from cdm.sharding import is_sharded
from cdm.training import Inputs, distill


class Watched(Distiller):
    crash_at = 0

    def round(self, iteration: int) -> Metrics:
        if self.crash_at and iteration == self.crash_at:
            sys.exit("crash")
        metrics = super().round(iteration)
        for learner in (self.student, self.fake):
            held = [*learner.parameters.values(), *learner.state().values()]
            sharded = [tensor for tensor in held if tensor.ndim]
            assert all(is_sharded(tensor) for tensor in sharded)
            here = sum(tensor.to_local().numel() for tensor in sharded)
            everywhere = sum(tensor.numel() for tensor in sharded)
            assert here < 0.7 * everywhere, f"{here} of {everywhere} numbers are here"
        return metrics


if __name__ == "__main__":
    torch.set_num_threads(1)
    world, out, checkpoints = (Path(argument) for argument in sys.argv[1:4])
    Watched.crash_at = int(sys.argv[4])
    params = load(world / "params.yaml")
    inputs = Inputs.gather(params, TeacherManifest.read(world / "teacher.json"), world / "prompts")
    distill.__globals__["Distiller"] = Watched
    distill(params, inputs, checkpoints=checkpoints, student=out / "student", log=out / "log.csv")
