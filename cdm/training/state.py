"""The state of a training: student and fake score with their optimisers, the student's moving average, the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cdm.errors import CdmError
from cdm.params import Distill
from cdm.training.checkpoint import Checkpoint, Saved
from cdm.training.distiller import Metrics
from cdm.training.networks import Networks
from cdm.training.optim import Learner, blend, ema_decay
from cdm.training.probe import Figures


@dataclass
class TrainingState:
    """Everything that changes during a training: the content of a checkpoint.

    `student` and `fake` are the two networks that learn, `average` is the exponential moving average of the student's
    parameters, `rows` are those of the log, one a round. `best` is the moving average at the best probe, or empty where
    none is kept.
    """

    networks: Networks
    student: Learner
    fake: Learner
    average: dict[str, Tensor]
    rows: list[dict[str, float]]
    iteration: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, networks: Networks, distill: Distill) -> TrainingState:
        """The state before the first iteration."""
        student_updates = (distill.iterations - distill.fake_only) // distill.student_every
        student = Learner(networks.parameters("student"), distill.student, student_updates)
        fake = Learner(networks.parameters("fake"), distill.fake, distill.iterations)
        average = {name: value.detach().clone() for name, value in student.parameters.items()}
        return cls(networks, student, fake, average, [])

    def after_round(self, metrics: Metrics, iteration: int, distill: Distill) -> None:
        """Enters the round that began at `iteration` into the moving average and the log.

        Raises CdmError that names the figures that are not finite.
        """
        check_finite(metrics, iteration)
        if iteration >= distill.fake_only:
            self.update_average(distill.ema)
        self.iteration = iteration + distill.student_every
        self.rows.append({"iteration": self.iteration, **metrics})

    def update_average(self, decay: float) -> None:
        """The moving average after an update of the student."""
        share = 1 - ema_decay(decay, self.student.updates_done - 1)
        blend(self.average.values(), self.student.parameters.values(), share)

    def note(self, figures: Figures, keep: str, column: str = "probe") -> None:
        """Enters a probe of the moving average into the newest row of the log, and keeps the one with the least figure
        in `column` if wanted."""
        before = min((row[column] for row in self.rows if column in row), default=math.inf)
        self.rows[-1] |= figures
        if keep == "best" and figures[column] < before:
            self.best = {name: value.clone() for name, value in self.average.items()}

    def choose_best(self) -> None:
        """Makes the moving average that of the best probe, if one was kept."""
        for name, value in self.best.items():
            self.average[name].copy_(value)

    def losses(self) -> str:
        """The newest losses, for the progress bar."""
        newest = self.rows[-1] if self.rows else {}
        return " ".join(f"{name[5:]} {value:.3f}" for name, value in newest.items() if name.startswith("loss_"))

    def checkpoint(self) -> Checkpoint:
        """The state, in the tensors of the training itself."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.parameters,
            "fake": self.fake.parameters,
            "average": self.average,
            "student_optimiser": self.student.state(),
            "fake_optimiser": self.fake.state(),
            "best": self.best,
        }
        updates = {"student": self.student.updates_done, "fake": self.fake.updates_done}
        tensors = {name: group for name, group in groups.items() if group}
        return Checkpoint(self.iteration, tensors, {"rows": self.rows, "updates": updates})

    def restore(self, saved: Saved) -> None:
        """Takes up the training where a checkpoint has left it."""
        if "best" in saved.groups:
            self.best = {name: torch.empty_like(value) for name, value in self.average.items()}
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.parameters,
            "fake": self.fake.parameters,
            "average": self.average,
            "best": self.best,
        }
        for name, into in groups.items():
            saved.fill(name, into)
        for name, learner in (("student", self.student), ("fake", self.fake)):
            group = f"{name}_optimiser"
            learner.restore(saved.shapes(group), partial(saved.fill, group), saved.state["updates"][name])
        self.iteration, self.rows = saved.step, saved.state["rows"]


def check_finite(metrics: Metrics, iteration: int) -> None:
    """CdmError naming the figures that are not finite."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise CdmError(
            f"training diverged: {', '.join(broken)} not finite in the round at iteration {iteration}; the last"
            " checkpoint is kept. Lower distill.student.lr or distill.fake.lr, or the scale of the term named"
        )
