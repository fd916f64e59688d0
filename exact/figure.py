"""The figure that explains continuous-time distribution matching on worlds where all of it can be seen.

Above a world on a line, with the noise level as the other axis: a flow is a curve there, an Euler step a straight
piece, and the data predicted at a point are where its tangent ends. Below the plane, with what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cdm.evaluation.plots import style
from cdm.evaluation.theme import LIGHT, Theme
from cdm.flow import add_noise, euler_step, velocity_to_x0
from cdm.randomness import philox
from cdm.rollout import Velocity
from cdm.schedule import draw_rollouts, off_trajectory_levels
from cdm.training.distiller import Distiller
from cdm.training.points import with_level
from exact.experiment import velocity_of
from exact.methods import METHODS
from exact.mixture import Mixture
from exact.world import PlaneModel, World, advance, draw, line, two_spirals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

METHOD = "cdm-level"
EARLY = 180
"""Iterations after which the student is shown while it still learns."""
SEED = 0
REACH = 2.6
"""Half the width of the pictures."""
SHOWN = 2
"""Steps of the samples that are shown."""
FLOW_STEPS = 200
DATA = 0.004
"""The level at which curves end: data, but for what cannot be seen."""


@dataclass(frozen=True)
class Rollout:
    """One student trajectory on the line: its levels and points up to the anchor, which is the last, and beyond."""

    sigmas: list[float]
    points: list[float]
    x0: float
    off_sigma: float
    off_point: float
    off_x0: float
    flow: tuple[list[float], list[float]]
    """Levels and points of the teacher's own curve through the anchor."""


@torch.no_grad()
def path(velocity: Velocity, x: Tensor, sigmas: Sequence[float] | Tensor, label: int = 0) -> Tensor:
    """All points (levels, n, d) of Euler's way from x (n, d) along `sigmas`."""
    levels, classes = torch.as_tensor(sigmas), torch.full((len(x),), label)
    points = [x]
    for sigma, following in pairwise(levels):
        level, next_level = sigma.expand(len(x)), following.expand(len(x))
        points.append(
            euler_step(points[-1], velocity(points[-1], level, {"class": classes}), level, next_level)
        )
    return torch.stack(points)


@torch.no_grad()
def rollouts(distiller: Distiller, mixture: Mixture, count: int, iteration: int) -> list[Rollout]:
    """Trajectories as the training step draws them, with the student it has now."""
    draws = distiller.draws(iteration, range(count))
    plan = draw_rollouts(distiller.schedule, distiller.shift, draws)
    noise = draws.normal("noise", (1,))
    limits = distiller.distill.renoise_min, distiller.distill.renoise_max
    off_sigmas = off_trajectory_levels(distiller.schedule, draws.uniform("off"), limits)
    student, teacher = distiller.velocity("student"), mixture.guided_velocity(1)
    found = []
    for row in range(count):
        sigmas = plan.sigmas[row, : plan.depth[row] + 1]
        points = path(student, noise[row : row + 1], sigmas)[:, 0, 0]
        x, sigma, sigma_off = points[-1].reshape(1, 1), sigmas[-1:], off_sigmas[row : row + 1]
        conditioning = {"class": torch.zeros(1, dtype=torch.long)}
        v = student(x, sigma, conditioning)
        x_off = euler_step(x, v, sigma, sigma_off)
        x0_off = velocity_to_x0(x_off, student(x_off, sigma_off, conditioning), sigma_off)
        levels = torch.linspace(float(sigma), float(sigma_off), 60)
        flow = path(teacher, x, levels)[:, 0, 0]
        found.append(
            Rollout(
                sigmas.tolist(),
                points.tolist(),
                float(velocity_to_x0(x, v, sigma)),
                float(sigma_off),
                float(x_off),
                float(x0_off),
                (levels.tolist(), flow.tolist()),
            )
        )
    return found


def _log_density(mixture: Mixture, points: int = 220, reach: float = REACH) -> np.ndarray:
    """Density over level (columns, from noise to data) and place, each column relative to its highest point."""
    x = torch.linspace(-reach, reach, points)[:, None]
    columns = []
    for sigma in torch.linspace(1, 0, points):
        density = mixture.log_density(x, float(sigma)).exp()
        columns.append((density / density.max()).sqrt())
    return torch.stack(columns, dim=1).numpy()


def _field(distiller: Distiller, x: Tensor, sigma: Tensor, label: int = 0) -> Tensor:
    """Teacher minus fake score in x0, the direction in which distribution matching moves the student: (n, d).

    Of a fake score that knows levels, what it learnt of data made from pure noise.
    """
    conditioning = {"class": torch.full((len(x),), label)}
    for_fake = with_level(conditioning, torch.ones(len(x)), distiller.distill)
    with torch.no_grad():
        real = velocity_to_x0(x, distiller.networks.velocity("teacher", x, sigma, conditioning), sigma)
        fake = velocity_to_x0(x, distiller.networks.velocity("fake", x, sigma, for_fake), sigma)
    return real - fake


class Painter:
    """The panels, in the colours of a theme."""

    def __init__(self, theme: Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        self.theme = theme
        self.classes = (theme.teacher, theme.student)
        self.haze = LinearSegmentedColormap.from_list("haze", [theme.ground, "#c3ccd6"])
        self.pull = LinearSegmentedColormap.from_list("pull", ["#6fb3dd", theme.ground, "#f2a877"])

    def levels(self, axes: Axes, mixture: Mixture, *, x_label: bool = True) -> AxesImage:
        """Ground of a panel of noise level against place."""
        image = axes.imshow(
            _log_density(mixture),
            extent=(1, 0, -REACH, REACH),
            origin="lower",
            aspect="auto",
            cmap=self.haze,
            interpolation="bilinear",
        )
        axes.set(xlim=(1.03, -0.04), ylim=(-REACH, REACH), xticks=[1, 0.75, 0.5, 0.25, 0], yticks=[])
        axes.set_xticklabels(["1\nnoise", ".75", ".5\nlevel $\\sigma$", ".25", "0\ndata"])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        return image

    def teacher(self, axes: Axes, mixture: Mixture) -> None:
        self.levels(axes, mixture)
        quantiles = torch.linspace(0.02, 0.98, 25)[:, None]
        starts = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
        sigmas = torch.linspace(1, DATA, FLOW_STEPS)
        curves = path(mixture.guided_velocity(1), starts, sigmas)[:, :, 0]
        axes.plot(sigmas, curves, color=self.theme.teacher, linewidth=1.1, alpha=0.9)
        axes.plot(
            [1] * len(starts), starts, "o", color=self.theme.ground, mec=self.theme.teacher, ms=3.5, mew=1
        )
        axes.plot([DATA] * len(starts), curves[-1], "o", color=self.theme.teacher, ms=3.5)

    def schedule(self, axes: Axes, mixture: Mixture, found: Sequence[Rollout]) -> None:
        self.levels(axes, mixture)
        self.key(axes, [("o", self.theme.muted, "anchor"), ("*", self.theme.muted, "data predicted there")])
        for index, rollout in enumerate(found):
            colour = self.theme.series[(0, 2, 3, 4, 5)[index % 5]]
            axes.plot(rollout.sigmas, rollout.points, "-", color=colour, linewidth=1.8)
            axes.plot(rollout.sigmas[:-1], rollout.points[:-1], "o", color=colour, ms=3.8)
            sigma, x = rollout.sigmas[-1], rollout.points[-1]
            axes.plot([sigma, 0], [x, rollout.x0], ":", color=colour, linewidth=1.6)
            axes.plot([sigma], [x], "o", color=self.theme.ground, mec=colour, ms=9, mew=2.2)
            axes.plot(
                [0], [rollout.x0], "*", color=colour, ms=10, mec=self.theme.ground, mew=0.6, clip_on=False
            )

    def key(self, axes: Axes, entries: Sequence[tuple[str, str, str]]) -> None:
        """A legend of (marker or line style, colour, words) at the bottom."""
        for look, colour, words in entries:
            is_line = look in ("-", ":")
            hollow = look == "o"
            axes.plot(
                [],
                [],
                linestyle=look if is_line else "",
                marker="" if is_line else look,
                color=self.theme.ground if hollow else colour,
                mec=colour,
                ms=8,
                mew=2 if hollow else 0,
                label=words,
            )
        axes.legend(loc="lower left", fontsize=8.5, handlelength=1.6, borderaxespad=0.2, labelspacing=0.3)

    def off_trajectory(self, axes: Axes, mixture: Mixture, found: Sequence[Rollout]) -> None:
        self.levels(axes, mixture)
        self.key(
            axes,
            [
                ("-", self.theme.teacher, "teacher's flow through the anchor"),
                ("D", self.theme.muted, "off the trajectory"),
                ("*", self.theme.muted, "data predicted there"),
            ],
        )
        for index, rollout in enumerate(found):
            colour = self.theme.series[(0, 2, 3)[index % 3]]
            sigma, x = rollout.sigmas[-1], rollout.points[-1]
            axes.plot(*rollout.flow, color=self.theme.teacher, linewidth=1.6, alpha=0.9)
            axes.plot([sigma, rollout.off_sigma], [x, rollout.off_point], "-", color=colour, linewidth=1.8)
            axes.plot(
                [rollout.off_sigma, 0], [rollout.off_point, rollout.off_x0], ":", color=colour, linewidth=1.6
            )
            axes.plot([sigma], [x], "o", color=self.theme.ground, mec=colour, ms=9, mew=2.2)
            axes.plot(
                [rollout.off_sigma], [rollout.off_point], "D", color=colour, ms=7.5, mec=self.theme.ground
            )
            axes.plot([0], [rollout.off_x0], "*", color=colour, ms=10, mec=self.theme.ground, clip_on=False)

    def line_field(self, axes: Axes, distiller: Distiller, mixture: Mixture, x0: Tensor) -> None:
        """The field over level and place, and re-noised points of `x0` (n, 1) with the way they are pulled."""
        self.levels(axes, mixture).set_alpha(0)
        count = 160
        sigma, x = torch.meshgrid(
            torch.linspace(1, 0.03, count), torch.linspace(-REACH, REACH, count), indexing="xy"
        )
        points = x.reshape(-1, 1)
        pull = _field(distiller, points, sigma.reshape(-1))[:, 0]
        occupied = mixture.log_density(points, sigma.reshape(-1)).exp()
        pull = (pull * (occupied / (occupied + 0.02))).reshape(count, count)
        axes.imshow(
            pull.numpy(),
            extent=(1, 0.03, -REACH, REACH),
            origin="lower",
            aspect="auto",
            cmap=self.pull,
            vmin=-0.35,
            vmax=0.35,
            interpolation="bilinear",
        )
        numbers = philox(SEED, "figure")
        tau = torch.linspace(0.08, 0.92, len(x0))
        noise = torch.from_numpy(numbers.standard_normal(x0.shape)).float()
        x_tau = add_noise(x0, noise, tau)
        pull = _field(distiller, x_tau, tau)
        shown = (x_tau.abs() < REACH)[:, 0]
        axes.plot(tau[shown], x_tau[shown, 0], "o", color=self.theme.ink, ms=2.6)
        axes.quiver(
            tau[shown],
            x_tau[shown, 0],
            torch.zeros(int(shown.sum())),
            pull[shown, 0],
            color=self.theme.ink,
            angles="xy",
            scale_units="xy",
            scale=0.7,
            width=0.0055,
            headwidth=4,
        )
        axes.set(xlim=(1.03, -0.04), ylim=(-REACH, REACH))

    def ground(self, axes: Axes, mixture: Mixture) -> None:
        """Ground of a panel of the plane: the density of each class."""
        from matplotlib.colors import LinearSegmentedColormap

        count = 200
        x, y = torch.meshgrid(*[torch.linspace(-REACH, REACH, count)] * 2, indexing="xy")
        points = torch.stack([x.reshape(-1), y.reshape(-1)], dim=1)
        for label, colour in enumerate(self.classes):
            density = mixture.log_density(points, 0.0, label).exp().reshape(count, count).sqrt()
            fade = LinearSegmentedColormap.from_list(colour, [f"{colour}00", f"{colour}40", f"{colour}66"])
            axes.contourf(x, y, density, levels=np.linspace(0.12, float(density.max()), 8), cmap=fade)
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def plane_flow(self, axes: Axes, mixture: Mixture) -> None:
        self.ground(axes, mixture)
        sigmas = torch.linspace(1, DATA, FLOW_STEPS)
        generator = torch.Generator().manual_seed(SEED)
        for label, colour in enumerate(self.classes):
            starts = torch.randn(60, 2, generator=generator)
            starts = starts[starts.abs().amax(1) < REACH - 0.2][:18]
            curves = path(mixture.guided_velocity(1), starts, sigmas, label)
            axes.plot(curves[:, :, 0], curves[:, :, 1], color=colour, linewidth=1.1, alpha=0.75)
            axes.plot(*curves[0].T, "o", color=self.theme.ground, mec=colour, ms=3.4, mew=0.9)
            axes.plot(*curves[-1].T, "o", color=colour, ms=4)

    def samples(self, axes: Axes, mixture: Mixture, velocity: Velocity, steps: int) -> None:
        self.ground(axes, mixture)
        labels = torch.arange(1600) % mixture.class_count
        noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(SEED))
        drawn = draw(velocity, noise, labels, steps)
        for label, colour in enumerate(self.classes):
            axes.plot(*drawn[labels == label].T, "o", color=colour, ms=1.9, alpha=0.65, mew=0)

    def plane_field(self, axes: Axes, distiller: Distiller, mixture: Mixture, tau: float = 0.35) -> None:
        """The field that an early student's one-step data meet, at one level, for the first class."""
        self.ground(axes, mixture)
        count = 19
        x, y = torch.meshgrid(*[torch.linspace(-2.1, 2.1, count)] * 2, indexing="xy")
        points = torch.stack([x.reshape(-1), y.reshape(-1)], dim=1)
        pull = _field(distiller, points, torch.full((len(points),), tau))
        generator = torch.Generator().manual_seed(SEED)
        labels = torch.zeros(500, dtype=torch.long)
        x0 = draw(distiller.velocity("student"), torch.randn(500, 2, generator=generator), labels, 1)
        x_tau = add_noise(x0, torch.randn(x0.shape, generator=generator), torch.full((500,), tau))
        near = torch.cdist(points, x_tau).kthvalue(6, dim=1).values < 0.35
        axes.plot(*x_tau.T, "o", color=self.theme.muted, ms=1.8, alpha=0.55, mew=0)
        axes.quiver(
            *points[near].T,
            *pull[near].T,
            color=self.theme.ink,
            angles="xy",
            scale_units="xy",
            scale=1.4,
            width=0.0055,
            headwidth=4,
        )


@dataclass(frozen=True)
class Subjects:
    """What the figure shows."""

    on_line: World
    on_plane: World
    early_line: Distiller
    early_plane: Distiller
    student: PlaneModel

    @classmethod
    def train(cls) -> Subjects:
        """Two trainings that stop early, and the plane's student."""
        method = METHODS[METHOD]
        on_line, on_plane = World(line()), World(two_spirals())

        def early(world: World) -> Distiller:
            distiller, run = world.prepare(method.schedule, method.distill, SEED)
            advance(distiller, run, EARLY)
            return distiller

        student = on_plane.distil(method.schedule, method.distill, SEED)
        return cls(on_line, on_plane, early(on_line), early(on_plane), student)


TITLES = (
    "a  Teacher: a curved flow, many steps",
    "b  Student: random lengths and levels",
    "c  Off the trajectory",
    "d  What pulls back: teacher minus fake",
    "e  In the plane: the teacher's flow",
    "f  The pull on an early student",
    f"g  Teacher, {SHOWN} steps",
    f"h  Student, {SHOWN} steps",
)


def paint(subjects: Subjects, out: Path, theme: Theme = LIGHT) -> None:
    """Draws the figure into the file `out`."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    on_line, on_plane = subjects.on_line.mixture, subjects.on_plane.mixture
    found = rollouts(subjects.early_line, on_line, 40, iteration=0)
    x0 = torch.tensor([[rollout.off_x0] for rollout in found])
    painter = Painter(theme)
    settings = style(theme) | {"axes.titlesize": 10.5, "axes.titlepad": 6}
    with mpl.rc_context(settings):
        figure, panels = plt.subplots(2, 4, figsize=(15, 8), layout="constrained")
        painter.teacher(panels[0, 0], on_line)
        painter.schedule(panels[0, 1], on_line, choose(found))
        painter.off_trajectory(panels[0, 2], on_line, stray(found))
        painter.line_field(panels[0, 3], subjects.early_line, on_line, x0)
        painter.plane_flow(panels[1, 0], on_plane)
        painter.plane_field(panels[1, 1], subjects.early_plane, on_plane)
        painter.samples(panels[1, 2], on_plane, on_plane.guided_velocity(1), SHOWN)
        painter.samples(panels[1, 3], on_plane, velocity_of(subjects.student), SHOWN)
        for axes, title in zip(panels.flat, TITLES, strict=True):
            axes.set_title(title)
        figure.savefig(out, dpi=150, metadata={"Software": None})
        plt.close(figure)


def choose(found: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts of different lengths whose anchors are apart, so that they can be distinguished."""
    chosen: list[Rollout] = []
    for rollout in sorted(found, key=lambda each: -len(each.sigmas)):
        is_separate = all(abs(rollout.points[0] - other.points[0]) > 0.35 for other in chosen)
        lengths = {len(each.sigmas) for each in chosen}
        if is_separate and len(rollout.sigmas) not in lengths and abs(rollout.points[0]) < REACH - 0.9:
            chosen.append(rollout)
    return chosen[:5]


def stray(found: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts whose off-trajectory points are farthest from the teacher's flow, apart from each other."""
    chosen: list[Rollout] = []
    for rollout in sorted(found, key=lambda each: -abs(each.off_point - each.flow[1][-1])):
        places = (rollout.points[-1], rollout.off_point)
        if max(map(abs, places)) < REACH - 0.4 and all(
            abs(place - other_place) > 0.5
            for other in chosen
            for place in places
            for other_place in (other.points[-1], other.off_point)
        ):
            chosen.append(rollout)
    return chosen[:3]
