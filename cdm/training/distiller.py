"""Continuous-time distribution matching, one round at a time (paper, section 3 and algorithm 1).

A round is `student_every` updates of the fake score and one of the student. What it shares, without changing the
expectation of any gradient: the rollout stops at each sample's anchor; one rollout serves the round; the student's
prediction at the anchor, made once and with its graph, serves the fake score's target, CA, DM and the
extrapolation; wherever DM's re-noise level also suits CA, both ask the teacher about the same point; all questions
to the teacher are one call, all to the fake score another.

The methods that CDM is compared with are settings of the same round: other schedules, other terms, a guided teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from cdm.consistency import consistency_direction, velocity_change
from cdm.flow import add_noise, euler_step, expand, renoise, velocity_to_x0, x0_to_velocity
from cdm.losses import (
    direction_loss,
    fake_score_loss,
    guidance_direction,
    guided,
    matching_direction,
    score_gradient,
    state_data_loss,
    state_score_loss,
)
from cdm.params import Distill, MatchingLoss, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning, simulate, take
from cdm.schedule import draw_rollouts, off_trajectory_levels
from cdm.training.networks import Networks, Role
from cdm.training.optim import Learner, blend

Metrics = dict[str, float]


@dataclass
class Anchor:
    """Some samples on the student's trajectory: `x` (batch, ...), `sigma` (batch,), and once it has been asked,
    the student's `velocity` there, with its graph if `keeps_graph`.

    `end` (batch,), or 0 where it is None, is the level of what is matched of it.
    """

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    samples: Sequence[int]
    keeps_graph: bool
    velocity: Tensor | None = None
    end: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        """The student's prediction of the data; `velocity` must have been asked for."""
        assert self.velocity is not None
        return velocity_to_x0(self.x, self.velocity, self.sigma)

    @property
    def output(self) -> Tensor:
        """What is matched, without a graph: the student's data, or the state at `end` to which it steps."""
        assert self.velocity is not None
        if self.end is None:
            return self.x0.detach()
        return euler_step(self.x, self.velocity.detach(), self.sigma, self.end)


class Query(NamedTuple):
    """Points at which a network is asked for x0."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning


class Renoised(NamedTuple):
    """What the student made, re-noised with `noise` to level `tau`."""

    x: Tensor
    tau: Tensor
    noise: Tensor

    def query(self, conditioning: Conditioning, rows: Tensor | slice = slice(None)) -> Query:
        return Query(self.x[rows], self.tau[rows], take(conditioning, rows))


class Pairs(NamedTuple):
    """Noise, and the teacher's samples that came from it."""

    noise: Tensor
    latents: Tensor
    conditioning: Conditioning


@dataclass
class Questions:
    """What a term wants to know: x0 of the teacher and of the fake score."""

    teacher: list[Query] = field(default_factory=list)
    fake: list[Query] = field(default_factory=list)


class Answers(NamedTuple):
    """The answers to the questions, in their order."""

    teacher: list[Tensor]
    fake: list[Tensor]


Terms = dict[str, Tensor]
Term = Generator[Questions, Answers, Terms]
"""Asks once, gets the answers, and returns one loss or several that share their questions."""


def conclude(term: Term, answers: Answers) -> Terms:
    """What a term that has asked makes of the answers."""
    try:
        term.send(answers)
    except StopIteration as done:
        terms: Terms = done.value
        return terms
    raise RuntimeError("a term asks once")


def guide(answers: list[Tensor], scale: float) -> Tensor:
    """The guided teacher's x0, from its answers with the prompt and, unless `scale` is 1, without."""
    return answers[0] if scale == 1 else guided(answers[0], answers[1], scale)


class Distiller:
    """The training step: networks and optimisers in, one round of updates after another.

    `prompts(iteration, samples)` gives the conditioning of global samples, `empty` that of the empty prompt (one
    row), and `pairs(draws)` those of a regression. `micro_batch` samples go through a forward and backward at once.
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
        pairs: Callable[[Draws], Pairs] | None = None,
        micro_batch: int | None = None,
        device: torch.device = torch.device("cpu"),
        most: Callable[[int], int] = int,
    ) -> None:
        self.networks, self.student, self.fake = networks, student, fake
        self.distill, self.schedule, self.shift, self.seed = distill, schedule, shift, seed
        self.prompts, self.empty, self.latent_shape, self.device = prompts, empty, tuple(latent_shape), device
        self.pairs, self.most = pairs, most
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
            if distill.rollouts == "fresh" and not is_last and not distill.losses.ask_fake:
                continue  # nobody learns from it
            if not anchors or distill.rollouts == "fresh":
                serves_student = learns and (is_last or distill.rollouts == "shared")
                anchors = [self.roll_out(now, part, serves_student) for part in self.parts]
            if distill.losses.ask_fake:
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
        alone = len(self.parts) == 1 and not self.distill.gradient_checkpointing
        keeps_graph = serves_student and alone and self.distill.losses.at_anchor
        end = rollouts.next_sigma if self.schedule.ends == "next" else None
        return Anchor(x, rollouts.anchor_sigma, conditioning, samples, keeps_graph, end=end)

    def predict(self, anchor: Anchor, with_graph: bool) -> None:
        """Asks the student about the anchor, unless the answer is there already."""
        if anchor.velocity is None or (with_graph and not anchor.velocity.requires_grad):
            with torch.set_grad_enabled(with_graph):
                anchor.velocity = self.networks.velocity("student", anchor.x, anchor.sigma, anchor.conditioning)

    # Step 3: the fake score learns the distribution that the student generates.

    def update_fake(self, iteration: int, anchors: list[Anchor]) -> Metrics:
        """One flow-matching update on the anchors' output, then a step towards the student's weights."""
        total = 0.0
        for anchor in anchors:
            self.predict(anchor, with_graph=anchor.keeps_graph)
            draws = self.draws(iteration, anchor.samples)
            bound = anchor.sigma if self.distill.fake_bounded else None
            at = self.renoise(anchor.output, bound, draws, "fake", anchor.end, level="sigma")
            conditioning = self.for_fake(anchor.conditioning, anchor.sigma)
            velocity = self.networks.velocity("fake", at.x, at.tau, conditioning)
            if anchor.end is None:
                loss = fake_score_loss(velocity, anchor.output, at.noise)
            elif self.distill.fake_target == "score":
                loss = state_score_loss(velocity, anchor.output, at.noise, anchor.end, at.tau)
            else:
                loss = state_data_loss(velocity, at.x, anchor.x0.detach(), at.tau)
            loss = loss / len(anchors)
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
            weights = self.distill.losses.weights
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() / len(anchors)
            self.networks.backward("student", loss)
            statistics |= {f"loss_{name}": float(term.detach()) for name, term in terms.items()}
            for name, value in statistics.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(anchors)
        lr = self.student.lr
        return metrics | {"grad_norm_student": self.student.step(), "lr_student": lr}

    def student_terms(self, anchor: Anchor, draws: Draws) -> tuple[Terms, Metrics]:
        """The terms that have a weight, each a scalar with a graph to the student, and some statistics."""
        losses = self.distill.losses
        self.predict(anchor, with_graph=losses.at_anchor)
        x0 = anchor.x0.detach()
        statistics = {"sigma": float(anchor.sigma.mean()), "x0_deviation": float(x0.std())}
        asking: list[Term] = []
        if losses.dm.weight or losses.ca.weight:
            asking.append(self.matching_and_guidance(anchor, draws, statistics))
        if losses.cdm.weight:
            asking.append(self.matching_off_trajectory(anchor, draws))
        if losses.sgmd.weight:
            asking.append(self.score_gradient(anchor, draws))
        if losses.consistency.weight:
            asking.append(self.consistency(anchor))
        if losses.regression.weight:
            asking.append(self.regression(draws))

        questions = [next(term) for term in asking]
        x0_real = iter(self.ask("teacher", [query for each in questions for query in each.teacher]))
        x0_fake = iter(self.ask("fake", [query for each in questions for query in each.fake]))
        terms: Terms = {}
        for term, asked in zip(asking, questions, strict=True):
            answers = Answers(list(islice(x0_real, len(asked.teacher))), list(islice(x0_fake, len(asked.fake))))
            terms |= conclude(term, answers)
        return terms, statistics

    def matching_and_guidance(self, anchor: Anchor, draws: Draws, statistics: Metrics) -> Term:
        """DM and CA at the anchor: they share its prediction and, where the level suits both, the teacher's answer."""
        ca, dm, min_norm = self.distill.losses.ca, self.distill.losses.dm, self.distill.losses.min_norm
        x0, conditioning = anchor.x0, anchor.conditioning
        at_dm, at_ca, own = self.renoise_at_anchor(anchor, anchor.output, draws)
        questions = self.ask_both(dm, at_dm, conditioning, anchor.sigma) if dm.weight else Questions()
        if ca.weight:
            questions.teacher += [at_ca.query(self.no_prompt(x0)), at_ca.query(conditioning, own)]
        real, fake = yield questions
        terms: Terms = {}
        x0_cond = torch.empty_like(x0)
        if dm.weight:
            x0_cond = real[0]
            terms["dm"] = self.matching(dm, x0, real, fake)
        if ca.weight:
            x0_uncond, x0_own = real[-2:]
            x0_cond = x0_cond.index_copy(0, own, x0_own)
            scale = ca.scale * expand(anchor.sigma**ca.fade, x0) if ca.fade else ca.scale
            terms["ca"] = direction_loss(x0, guidance_direction(x0, x0_cond, x0_uncond, scale, min_norm))
        statistics["x0_distance"] = float((x0_cond - x0.detach()).abs().mean())
        return terms

    def matching_off_trajectory(self, anchor: Anchor, draws: Draws) -> Term:
        """CDM: DM where the student's own velocity, followed too far, leads."""
        cdm = self.distill.losses.cdm
        x0, sigma = self.off_trajectory(anchor, draws)
        at = self.renoise(x0.detach(), sigma if cdm.bounded else None, draws, "cdm")
        real, fake = yield self.ask_both(cdm, at, anchor.conditioning, sigma)
        return {"cdm": self.matching(cdm, x0, real, fake)}

    def score_gradient(self, anchor: Anchor, draws: Draws) -> Term:
        """SGMD: what the fake score's input has of the difference of the scores; its parameters get none of it."""
        sgmd, x0, conditioning = self.distill.losses.sgmd, anchor.x0, anchor.conditioning
        at = self.renoise(x0.detach(), anchor.sigma if sgmd.bounded else None, draws, "sgmd")
        real, _ = yield Questions(self.ask_teacher(at.x, at.tau, conditioning, sgmd.guidance_scale))
        x = at.x.requires_grad_()
        for_fake = self.for_fake(conditioning, anchor.sigma)
        x0_fake = velocity_to_x0(x, self.networks.velocity("fake", x, at.tau, for_fake), at.tau)
        x0_real = guide(real, sgmd.guidance_scale)
        gradient = score_gradient(x0.detach(), x0_real, x0_fake.detach(), at.tau, sgmd.regulariser)
        (gradient,) = torch.autograd.grad(x0_fake, x, gradient)
        return {"sgmd": direction_loss(x0, -0.5 * (1 - expand(at.tau, x0)) * gradient)}

    def consistency(self, anchor: Anchor) -> Term:
        """Consistency at the anchor, along the teacher's flow from there."""
        settings, x, sigma = self.distill.losses.consistency, anchor.x, anchor.sigma
        assert anchor.velocity is not None
        real, _ = yield Questions(self.ask_teacher(x, sigma, anchor.conditioning, settings.guidance_scale))
        flow = x0_to_velocity(x, guide(real, settings.guidance_scale), sigma)
        step = sigma.clamp(max=settings.step)
        velocity = anchor.velocity.detach()
        change = velocity_change(self.velocity("student"), x, sigma, anchor.conditioning, velocity, flow, step)
        share = min(1.0, (self.student.updates_done + 1) / settings.warmup) if settings.warmup else 1.0
        direction = consistency_direction(velocity, flow, change, sigma, step, share)
        return {"consistency": direction_loss(anchor.x0, direction)}

    def regression(self, draws: Draws) -> Term:
        """DMD's regression: from the noise of a pair one step to the teacher's sample."""
        assert self.pairs is not None
        yield Questions()
        noise, latents, conditioning = self.pairs(draws)
        sigma = noise.new_ones(len(noise))
        x0 = velocity_to_x0(noise, self.networks.velocity("student", noise, sigma, conditioning), sigma)
        return {"regression": direction_loss(x0, latents - x0.detach())}

    def ask_teacher(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, scale: float) -> list[Query]:
        """The questions to a teacher that is guided by `scale`; `guide` puts the answers together."""
        prompts = [conditioning] if scale == 1 else [conditioning, self.no_prompt(x)]
        return [Query(x, sigma, prompt) for prompt in prompts]

    def ask_both(
        self, settings: MatchingLoss, at: Renoised, conditioning: Conditioning, sigma: Tensor
    ) -> Questions:
        """The questions of `matching`, on data that the student made at level `sigma`."""
        return Questions(
            self.ask_teacher(at.x, at.tau, conditioning, settings.guidance_scale),
            [at.query(self.for_fake(conditioning, sigma))],
        )

    def matching(self, settings: MatchingLoss, x0: Tensor, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """The loss of distribution matching, from the answers to `ask_both`."""
        x0_real = guide(real, settings.guidance_scale)
        return direction_loss(x0, matching_direction(x0, x0_real, fake[0], self.distill.losses.min_norm))

    def no_prompt(self, like: Tensor) -> Conditioning:
        """The empty prompt for each sample of `like`."""
        return {name: row.expand(len(like), *row.shape[1:]) for name, row in self.empty.items()}

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
        at_dm = self.renoise(x0, anchor.sigma if dm.bounded else None, draws, "dm", anchor.end)
        if not ca.weight:
            return at_dm, at_dm, torch.empty(0, dtype=torch.long)
        bound = anchor.sigma if ca.bounded else torch.ones_like(anchor.sigma)
        dm_bound = anchor.sigma if dm.bounded else torch.ones_like(anchor.sigma)
        shares = (draws.uniform("dm_tau") * dm_bound <= bound) & (bound <= dm_bound)
        if not dm.weight:
            shares = torch.zeros_like(shares)
        at_own = self.renoise(x0, bound, draws, "ca")
        here = shares.reshape(-1, *[1] * (x0.ndim - 1))
        at_ca = Renoised(
            torch.where(here, at_dm.x, at_own.x),
            torch.where(shares, at_dm.tau, at_own.tau),
            torch.where(here, at_dm.noise, at_own.noise),
        )
        return at_dm, at_ca, torch.nonzero(~shares)[:, 0]

    def renoise(
        self,
        x: Tensor,
        bound: Tensor | None,
        draws: Draws,
        purpose: str,
        end: Tensor | None = None,
        level: str = "tau",
    ) -> Renoised:
        """Data, or states of level `end`, at tau ~ U(0 or end, bound or 1), clamped."""
        tau, noise = draws.uniform(f"{purpose}_{level}"), draws.normal(f"{purpose}_noise", self.latent_shape)
        if end is None:
            tau = self.clamp(tau if bound is None else tau * bound)
            return Renoised(add_noise(x, noise, tau), tau, noise)
        tau = end + tau * ((1.0 if bound is None else bound) - end)
        tau = self.clamp(torch.maximum(tau, end + self.distill.renoise_min))
        return Renoised(renoise(x, noise, end, tau), tau, noise)

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
