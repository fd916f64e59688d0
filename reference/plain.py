"""CDM in the plain order of operations, as papers write it: the yardstick for `cdm.training.distiller`.

It shares no code with what it checks. Nothing is shared between the terms and nothing is skipped: every sample runs
through its whole rollout, the student is run again for each term, and each question to teacher and fake score is a
call of its own. Random numbers have the same names (seed, purpose, iteration, sample), so losses, gradients and
weights must be the same to rounding. Equations and sections are those of the paper (arXiv 2605.06376).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cdm.flow import add_noise, euler_step, expand, velocity_to_x0
from cdm.losses import direction_loss, fake_score_loss, guidance_direction, matching_direction
from cdm.params import Distill, MatchingLoss, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning
from cdm.schedule import draw_rollouts, off_trajectory_levels
from cdm.training.networks import Networks, Role
from cdm.training.optim import Learner

State = tuple[Tensor, Tensor, Tensor, Conditioning]
"""A point of the student's trajectory, (batch, ...); its level, (batch,); the velocity there; the prompts."""


class PlainDistiller:
    """The training step for the terms CA, DM and CDM, on one process and the whole batch at once.

    Arguments are those of `Distiller`. ValueError for terms and targets of other methods.
    """

    def __init__(
        self,
        networks: Networks,
        student: Learner,
        fake: Learner,
        *,
        distill: Distill,
        schedule: Schedule,
        shift: float,
        seed: int,
        prompts: Callable[[int, Sequence[int]], Conditioning],
        empty: Conditioning,
        latent_shape: Sequence[int],
        samples: Sequence[int],
        device: torch.device = torch.device("cpu"),
        **_others: object,
    ) -> None:
        terms = distill.losses
        guided_teacher = terms.dm.guidance_scale != 1 or terms.cdm.guidance_scale != 1
        if not {"ca", "dm", "cdm"}.issuperset(terms.weights) or guided_teacher or distill.fake_bounded:
            raise ValueError(
                "the plain order of operations is that of CDM alone: CA, DM and CDM, unguided teacher"
            )
        if schedule.ends != "data":
            raise ValueError(f"schedule.ends is {schedule.ends!r}: CDM matches data")
        self.networks, self.student, self.fake = networks, student, fake
        self.distill, self.schedule, self.shift, self.seed = distill, schedule, shift, seed
        self.prompts, self.empty, self.samples, self.shape = prompts, empty, samples, tuple(latent_shape)
        self.device = device

    def round(self, iteration: int) -> dict[str, float]:
        """Algorithm 1: `student_every` updates of the fake score, then, past `fake_only`, one of the student."""
        last = iteration + self.distill.student_every - 1
        metrics: dict[str, float] = {}
        for now in range(iteration, last + 1):
            draws = Draws(self.seed, now, self.samples, self.device)
            if now == iteration or self.distill.rollouts == "fresh":
                anchor = self.roll_out(draws)
            if self.distill.losses.dm.weight or self.distill.losses.cdm.weight:
                metrics |= self.update_fake(anchor, draws)
        if iteration >= self.distill.fake_only:
            metrics |= self.update_student(anchor, draws)
        return metrics

    @torch.no_grad()
    def roll_out(self, draws: Draws) -> State:
        """Section 3.1: each sample along its whole schedule, and of that the point where it is to be matched."""
        prompts = self.prompts(draws.iteration, draws.samples)
        rollouts = draw_rollouts(self.schedule, self.shift, draws)
        x, trajectory = draws.normal("noise", self.shape), []
        for sigma, next_sigma in zip(
            rollouts.sigmas.T, [*rollouts.sigmas.T[1:], torch.zeros_like(rollouts.sigmas[:, 0])], strict=True
        ):
            # A level of 0 is padding behind a sample's own schedule: nothing is asked about it.
            velocity, runs = torch.zeros_like(x), sigma > 0
            moving = {name: value[runs] for name, value in prompts.items()}
            velocity[runs] = self.networks.velocity("student", x[runs], sigma[runs], moving)
            trajectory.append((x, sigma, velocity))
            x = euler_step(x, velocity, sigma, next_sigma)
        chosen = [[part[row] for part in trajectory[depth]] for row, depth in enumerate(rollouts.depth)]
        x, sigma, velocity = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        return x, sigma, velocity, prompts

    def update_fake(self, anchor: State, draws: Draws) -> dict[str, float]:
        """The fake score learns, by flow matching, the distribution that the student generates."""
        x, sigma, velocity, prompts = anchor
        x0 = velocity_to_x0(x, velocity, sigma)
        if self.distill.fake_draws == "mirrored" and (draws.iteration % self.distill.student_every) % 2 == 1:
            draws = Draws(self.seed, draws.iteration - 1, self.samples, self.device, mirrored=True)
        tau, noise = self.clamp(draws.uniform("fake_sigma")), draws.normal("fake_noise", self.shape)
        predicted = self.networks.velocity(
            "fake", add_noise(x0, noise, tau), tau, self.for_fake(prompts, sigma)
        )
        loss = fake_score_loss(predicted, x0, noise)
        self.networks.backward("fake", loss)
        norm = self.fake.step()
        for name, value in self.student.parameters.items():
            fake = self.fake.parameters[name].data
            fake.copy_((1 - self.distill.merge) * fake + self.distill.merge * value.data)
        return {"loss_fake": float(loss.detach()), "grad_norm_fake": norm}

    def update_student(self, anchor: State, draws: Draws) -> dict[str, float]:
        """The student descends the weighted sum of its terms; each has a forward and a backward of its own."""
        terms, metrics = {"dm": self.dm, "ca": self.ca, "cdm": self.cdm}, {}
        for name, weight in self.distill.losses.weights.items():
            loss = terms[name](anchor, draws)
            self.networks.backward("student", weight * loss)
            metrics[f"loss_{name}"] = float(loss.detach())
        return metrics | {"grad_norm_student": self.student.step()}

    def dm(self, anchor: State, draws: Draws) -> Tensor:
        """Distribution matching at the anchor."""
        x, sigma, _, prompts = anchor
        return self.matching(self.distill.losses.dm, x, sigma, prompts, draws, "dm")

    def cdm(self, anchor: State, draws: Draws) -> Tensor:
        """Section 3.3: distribution matching where the student's own velocity, followed too far, leads."""
        x, sigma, velocity, prompts = anchor
        limits = self.distill.renoise_min, self.distill.renoise_max
        sigma_off = off_trajectory_levels(self.schedule, draws.uniform("off"), limits)
        x_off = euler_step(x, velocity, sigma, sigma_off)
        return self.matching(self.distill.losses.cdm, x_off, sigma_off, prompts, draws, "cdm")

    def matching(
        self,
        settings: MatchingLoss,
        x: Tensor,
        sigma: Tensor,
        prompts: Conditioning,
        draws: Draws,
        purpose: str,
    ) -> Tensor:
        """The student's data from `x`, towards where teacher and fake score differ on them, re-noised."""
        x0 = velocity_to_x0(x, self.networks.velocity("student", x, sigma, prompts), sigma)
        bound = sigma if settings.bounded else torch.ones_like(sigma)
        tau, noise = (
            self.clamp(draws.uniform(f"{purpose}_tau") * bound),
            draws.normal(f"{purpose}_noise", self.shape),
        )
        x_tau = add_noise(x0.detach(), noise, tau)
        x0_real = self.predict("teacher", x_tau, tau, prompts)
        x0_fake = self.predict("fake", x_tau, tau, self.for_fake(prompts, sigma))
        return direction_loss(x0, matching_direction(x0, x0_real, x0_fake, self.distill.losses.min_norm))

    def ca(self, anchor: State, draws: Draws) -> Tensor:
        """Section 3.2: what guidance adds to the teacher, as a direction.

        Where DM re-noises to a level that CA may use, CA takes its level and noise: the same distribution.
        """
        x, sigma, _, prompts = anchor
        settings, dm = self.distill.losses.ca, self.distill.losses.dm
        x0 = velocity_to_x0(x, self.networks.velocity("student", x, sigma, prompts), sigma)
        ones = torch.ones_like(sigma)
        bound, dm_bound = sigma if settings.bounded else ones, sigma if dm.bounded else ones
        tau, noise = draws.uniform("ca_tau") * bound, draws.normal("ca_noise", self.shape)
        dm_tau, dm_noise = draws.uniform("dm_tau") * dm_bound, draws.normal("dm_noise", self.shape)
        for row in range(len(x)):
            if settings.point == "shared" and dm.weight and dm_tau[row] <= bound[row] <= dm_bound[row]:
                tau[row], noise[row] = dm_tau[row], dm_noise[row]
        tau = self.clamp(tau)
        x_tau = add_noise(x0.detach(), noise, tau)
        x0_cond = self.predict("teacher", x_tau, tau, prompts)
        empty = {name: row.expand(len(x), *row.shape[1:]) for name, row in self.empty.items()}
        x0_uncond = self.predict("teacher", x_tau, tau, empty)
        scale = settings.scale * expand(sigma, x) ** settings.fade
        direction = guidance_direction(x0, x0_cond, x0_uncond, scale, self.distill.losses.min_norm)
        return direction_loss(x0, direction)

    @torch.no_grad()
    def predict(self, role: Role, x: Tensor, sigma: Tensor, prompts: Conditioning) -> Tensor:
        """The data that teacher or fake score see in `x`."""
        return velocity_to_x0(x, self.networks.velocity(role, x, sigma, prompts), sigma)

    def for_fake(self, prompts: Conditioning, sigma: Tensor) -> Conditioning:
        """The fake score may be told the level at which the student made its data."""
        return prompts | {"level": sigma[:, None]} if self.distill.fake_knows_level else prompts

    def clamp(self, tau: Tensor) -> Tensor:
        return tau.clamp(self.distill.renoise_min, self.distill.renoise_max)
