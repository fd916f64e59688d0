"""Continuous-time distribution matching, one round at a time (paper, section 3 and algorithm 1).

A round is `student_every` updates of the fake score and one of the student. What it shares, without changing the
expectation of any gradient: the rollout stops at each sample's anchor; one rollout serves the round; the student's
prediction at the anchor, made once and with its graph, serves the fake score's target, CA, DM and the
extrapolation; wherever DM's re-noise level also suits CA, both ask the teacher about the same point; all questions
to the teacher are one call, all to the fake score another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cdm.flow import add_noise, euler_step, velocity_to_x0
from cdm.losses import direction_loss, fake_score_loss, guidance_direction, matching_direction
from cdm.networks import Networks, Role
from cdm.optim import Learner, blend
from cdm.params import Distill, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning, simulate, take
from cdm.schedule import draw_rollouts, off_trajectory_levels

Metrics = dict[str, float]


@dataclass
class Anchor:
    """Some samples on the student's trajectory: `x` (batch, ...), `sigma` (batch,), and once it has been asked,
    the student's `velocity` there, with its graph if `keeps_graph`."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    samples: Sequence[int]
    keeps_graph: bool
    velocity: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        """The student's prediction of the data; `velocity` must have been asked for."""
        assert self.velocity is not None
        return velocity_to_x0(self.x, self.velocity, self.sigma)


class Query(NamedTuple):
    """Points at which a network is asked for x0."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning


class Renoised(NamedTuple):
    """Student data re-noised to level `tau`."""

    x: Tensor
    tau: Tensor

    def query(self, conditioning: Conditioning, rows: Tensor | slice = slice(None)) -> Query:
        return Query(self.x[rows], self.tau[rows], take(conditioning, rows))


class Distiller:
    """The training step: networks and optimisers in, one round of updates after another.

    `prompts(iteration, samples)` gives the conditioning of global samples, `empty` that of the empty prompt (one
    row). `micro_batch` samples go through a forward and backward at once.
    `most` is the largest of a number over processes that must ask a network equally often.
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
        micro_batch: int | None = None,
        device: torch.device = torch.device("cpu"),
        most: Callable[[int], int] = int,
    ) -> None:
        self.networks, self.student, self.fake = networks, student, fake
        self.distill, self.schedule, self.shift, self.seed = distill, schedule, shift, seed
        self.prompts, self.empty, self.latent_shape, self.device = prompts, empty, tuple(latent_shape), device
        self.most = most
        size = micro_batch or len(samples)
        self.parts = [samples[start : start + size] for start in range(0, len(samples), size)]

    def round(self, iteration: int) -> Metrics:
        """`student_every` fake-score updates from `iteration` on, then, past `fake_only`, one of the student."""
        distill = self.distill
        metrics: Metrics = {}
        anchors: list[Anchor] = []
        learns = iteration >= distill.fake_only
        for now in range(iteration, iteration + distill.student_every):
            is_last = now == iteration + distill.student_every - 1
            if not anchors or distill.rollouts == "fresh":
                serves_student = learns and (is_last or distill.rollouts == "shared")
                anchors = [self.roll_out(now, part, serves_student) for part in self.parts]
            metrics |= self.update_fake(now, anchors)
        if learns:
            metrics |= self.update_student(now, anchors)
        return metrics

    def draws(self, iteration: int, samples: Sequence[int]) -> Draws:
        return Draws(self.seed, iteration, samples, self.device)

    def velocity(self, role: Role) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        return lambda x, sigma, conditioning: self.networks.velocity(role, x, sigma, conditioning)

    # Steps 1 and 2: schedule and rollout.

    def roll_out(self, iteration: int, samples: Sequence[int], serves_student: bool) -> Anchor:
        """Anchors of `samples` on trajectories of the present student."""
        draws = self.draws(iteration, samples)
        conditioning = self.prompts(iteration, samples)
        rollouts = draw_rollouts(self.schedule, self.shift, draws)
        noise = draws.normal("noise", self.latent_shape)
        calls = self.most(max(rollouts.depth))
        x = simulate(self.velocity("student"), noise, conditioning, rollouts, calls)
        # With several parts their graphs would be alive together: the prediction is made again when needed.
        keeps_graph = serves_student and len(self.parts) == 1 and not self.distill.gradient_checkpointing
        return Anchor(x, rollouts.anchor_sigma, conditioning, samples, keeps_graph)

    def predict(self, anchor: Anchor, with_graph: bool) -> None:
        """Asks the student about the anchor, unless the answer is there already."""
        if anchor.velocity is None or (with_graph and not anchor.velocity.requires_grad):
            with torch.set_grad_enabled(with_graph):
                anchor.velocity = self.networks.velocity("student", anchor.x, anchor.sigma, anchor.conditioning)

    # Step 3: the fake score learns the distribution that the student generates.

    def update_fake(self, iteration: int, anchors: list[Anchor]) -> Metrics:
        """One flow-matching update on the anchors' x0, then a step towards the student's weights."""
        total = 0.0
        for anchor in anchors:
            self.predict(anchor, with_graph=anchor.keeps_graph)
            draws = self.draws(iteration, anchor.samples)
            x0, noise = anchor.x0.detach(), draws.normal("fake_noise", self.latent_shape)
            sigma = self.clamp(draws.uniform("fake_sigma"))
            x = add_noise(x0, noise, sigma)
            conditioning = self.for_fake(anchor.conditioning, anchor.sigma)
            velocity = self.networks.velocity("fake", x, sigma, conditioning)
            loss = fake_score_loss(velocity, x0, noise) / len(anchors)
            self.networks.backward("fake", loss)
            total += float(loss.detach())
        lr, norm = self.fake.lr, self.fake.step()
        shared = [self.fake.parameters[name] for name in self.student.parameters]
        blend(shared, self.student.parameters.values(), self.distill.merge)
        return {"loss_fake": total, "grad_norm_fake": norm, "lr_fake": lr}

    # Step 4: the student moves where teacher and fake score differ.

    def update_student(self, iteration: int, anchors: list[Anchor]) -> Metrics:
        """One update of the student on the weighted sum of its terms."""
        metrics: Metrics = {}
        for anchor in anchors:
            terms, statistics = self.student_terms(anchor, self.draws(iteration, anchor.samples))
            weights = {name: getattr(self.distill.losses, name).weight for name in terms}
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() / len(anchors)
            self.networks.backward("student", loss)
            statistics |= {f"loss_{name}": float(term.detach()) for name, term in terms.items()}
            for name, value in statistics.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(anchors)
        lr = self.student.lr
        return metrics | {"grad_norm_student": self.student.step(), "lr_student": lr}

    def student_terms(self, anchor: Anchor, draws: Draws) -> tuple[dict[str, Tensor], Metrics]:
        """The terms that have a weight, each a scalar with a graph to the student, and some statistics."""
        ca, dm, cdm = self.distill.losses.ca, self.distill.losses.dm, self.distill.losses.cdm
        conditioning = anchor.conditioning
        self.predict(anchor, with_graph=ca.weight > 0 or dm.weight > 0)
        x0 = anchor.x0
        for_teacher: list[Query] = []
        for_fake: list[Query] = []
        at_dm, at_ca, own = self.renoise_at_anchor(anchor, x0.detach(), draws)
        if dm.weight:
            for_teacher.append(at_dm.query(conditioning))
            for_fake.append(at_dm.query(self.for_fake(conditioning, anchor.sigma)))
        if ca.weight:
            empty = {name: row.expand(len(x0), *row.shape[1:]) for name, row in self.empty.items()}
            for_teacher += [at_ca.query(empty), at_ca.query(conditioning, own)]
        if cdm.weight:
            x0_off, sigma_off = self.off_trajectory(anchor, draws)
            at_cdm = self.renoise(x0_off.detach(), sigma_off if cdm.bounded else None, draws, "cdm")
            for_teacher.append(at_cdm.query(conditioning))
            for_fake.append(at_cdm.query(self.for_fake(conditioning, sigma_off)))

        x0_real, x0_fake = iter(self.ask("teacher", for_teacher)), iter(self.ask("fake", for_fake))
        terms: dict[str, Tensor] = {}
        x0_cond = torch.empty_like(x0)
        if dm.weight:
            x0_cond = next(x0_real)
            terms["dm"] = direction_loss(x0, matching_direction(x0, x0_cond, next(x0_fake)))
        if ca.weight:
            x0_uncond = next(x0_real)
            x0_cond = x0_cond.index_copy(0, own, next(x0_real))
            terms["ca"] = direction_loss(x0, guidance_direction(x0, x0_cond, x0_uncond, ca.scale))
        if cdm.weight:
            terms["cdm"] = direction_loss(x0_off, matching_direction(x0_off, next(x0_real), next(x0_fake)))
        statistics = {"sigma": float(anchor.sigma.mean()), "x0_deviation": float(x0.detach().std())}
        if ca.weight or dm.weight:
            statistics["x0_distance"] = float((x0_cond - x0.detach()).abs().mean())
        return terms, statistics

    def off_trajectory(self, anchor: Anchor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The student's x0, with a graph, at a point extrapolated along its own velocity, and that point's level."""
        assert anchor.velocity is not None
        sigma_off = off_trajectory_levels(self.schedule, draws.uniform("off"))
        x_off = euler_step(anchor.x, anchor.velocity.detach(), anchor.sigma, sigma_off)
        velocity = self.networks.velocity("student", x_off, sigma_off, anchor.conditioning)
        return velocity_to_x0(x_off, velocity, sigma_off), sigma_off

    def renoise_at_anchor(self, anchor: Anchor, x0: Tensor, draws: Draws) -> tuple[Renoised, Renoised, Tensor]:
        """The anchor's x0 re-noised for DM and for CA, and the rows where CA's point is not DM's.

        CA wants tau ~ U(0, b) with b below DM's bound B: where DM's own draw fell below b it is such a draw, so CA
        takes DM's point, and another draw elsewhere. Each keeps its distribution, and the teacher is asked once.
        """
        ca, dm = self.distill.losses.ca, self.distill.losses.dm
        at_dm = self.renoise(x0, anchor.sigma if dm.bounded else None, draws, "dm")
        if not ca.weight:
            return at_dm, at_dm, torch.empty(0, dtype=torch.long)
        bound = anchor.sigma if ca.bounded else torch.ones_like(anchor.sigma)
        dm_bound = anchor.sigma if dm.bounded else torch.ones_like(anchor.sigma)
        shares = (draws.uniform("dm_tau") * dm_bound <= bound) & (bound <= dm_bound)
        if not dm.weight:
            shares = torch.zeros_like(shares)
        at_own = self.renoise(x0, bound, draws, "ca")
        at_ca = Renoised(
            torch.where(shares.reshape(-1, *[1] * (x0.ndim - 1)), at_dm.x, at_own.x),
            torch.where(shares, at_dm.tau, at_own.tau),
        )
        return at_dm, at_ca, torch.nonzero(~shares)[:, 0]

    def renoise(self, x0: Tensor, bound: Tensor | None, draws: Draws, purpose: str) -> Renoised:
        """`x0` at tau ~ U(0, bound), or U(0, 1), clamped."""
        tau = draws.uniform(f"{purpose}_tau")
        tau = self.clamp(tau if bound is None else tau * bound)
        return Renoised(add_noise(x0, draws.normal(f"{purpose}_noise", self.latent_shape), tau), tau)

    def for_fake(self, conditioning: Conditioning, sigma: Tensor) -> Conditioning:
        """What the fake score is told of data that the student made at level `sigma`."""
        return conditioning | {"level": sigma[:, None]} if self.distill.fake_knows_level else conditioning

    def clamp(self, tau: Tensor) -> Tensor:
        """Re-noise levels kept off the ends, where directions blow up or vanish."""
        return tau.clamp(self.distill.renoise_min, self.distill.renoise_max)

    @torch.no_grad()
    def ask(self, role: Role, queries: list[Query]) -> list[Tensor]:
        """The role's x0 at each query, all in one call."""
        if not queries:
            return []
        x = torch.cat([query.x for query in queries])
        sigma = torch.cat([query.sigma for query in queries])
        names = queries[0].conditioning
        conditioning = {name: torch.cat([query.conditioning[name] for query in queries]) for name in names}
        x0 = velocity_to_x0(x, self.networks.velocity(role, x, sigma, conditioning), sigma)
        return list(x0.split([len(query.x) for query in queries]))
