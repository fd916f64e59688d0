"""The terms of the student's loss: the predictions that each needs of teacher and fake score, and the loss made
of them.

A term is a generator. It yields its questions once, is sent the answers, and returns its loss; so that the questions
of all terms become one call of the teacher and one of the fake score. Its settings and the record of what it needs are
in `cdm.params` under the same name. A new term is a section there, a function here, and a line in `TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from cdm.consistency import consistency_direction, velocity_change
from cdm.families.base import expand_to_batch
from cdm.flow import euler_step, expand, velocity_to_x0, x0_to_velocity
from cdm.losses import direction_loss, guidance_direction, matching_direction, score_gradient
from cdm.params import Distill, Losses, MatchingLoss, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning
from cdm.schedule import off_trajectory_levels
from cdm.training.networks import Networks, Role
from cdm.training.points import Anchor, Query, Renoised, renoise_output, with_level


class Pairs(NamedTuple):
    """Noise, and the teacher's samples that came from it."""

    noise: Tensor
    latents: Tensor
    conditioning: Conditioning


PairSource = Callable[[Draws], Pairs]
Guide = Callable[[Tensor, Tensor, float], Tensor]
"""Classifier-free guidance on velocities, (with the prompt, without, scale), as the teacher's pipeline does it."""


@dataclass
class Questions:
    """The predictions that a term needs: x0 of the teacher and of the fake score, at some points each."""

    teacher: list[Query] = field(default_factory=list)
    fake: list[Query] = field(default_factory=list)


class Answers(NamedTuple):
    """The answers to a term's questions, in their order, and those that the terms before it have got, by name."""

    teacher: list[Tensor]
    fake: list[Tensor]
    before: Mapping[str, Answers]


class Outcome(NamedTuple):
    """A term's loss, a scalar with a graph to the student, and figures for the log."""

    loss: Tensor
    statistics: dict[str, float]


Term = Generator[Questions, Answers, Outcome]


@dataclass
class Context:
    """The inputs of the terms in a student update: some samples at their anchor, the networks, the settings.

    `empty` is the conditioning of the empty prompt (one row), `updates_done` the number of student updates so far.
    """

    anchor: Anchor
    draws: Draws
    networks: Networks
    distill: Distill
    schedule: Schedule
    empty: Conditioning
    pairs: PairSource | None
    guide: Guide
    updates_done: int

    @property
    def losses(self) -> Losses:
        """The settings of the terms."""
        return self.distill.losses

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity of a network."""
        return self.networks.velocity(role, x, sigma, conditioning)

    def no_prompt(self, like: Tensor) -> Conditioning:
        """The empty prompt for each sample of `like`."""
        return expand_to_batch(self.empty, len(like))

    def for_fake(self, sigma: Tensor) -> Conditioning:
        """The fake score's conditioning for data that the student made at noise level `sigma`."""
        return with_level(self.anchor.conditioning, sigma, self.distill)

    def renoised(self, output: Tensor, purpose: str, bound: Tensor | None) -> Renoised:
        """Data re-noised to tau ~ U(0, `bound` or 1)."""
        return renoise_output(output, self.draws, purpose, self.distill, bound=bound)

    def teacher_queries(self, x: Tensor, sigma: Tensor, guidance_scale: float) -> list[Query]:
        """The questions to a guided teacher at (x, sigma); `guided_answer` puts the answers together."""
        prompts = [self.anchor.conditioning]
        if guidance_scale != 1:
            prompts.append(self.no_prompt(x))
        return [Query(x, sigma, prompt) for prompt in prompts]

    def guided_answer(self, answers: list[Tensor], x: Tensor, sigma: Tensor, guidance_scale: float) -> Tensor:
        """The guided teacher's x0 at (x, sigma), from its answers with the prompt and, unless the scale is 1, without.

        Guidance is that of the teacher's pipeline, which works on velocities: in some families more than a sum.
        """
        if guidance_scale == 1:
            return answers[0]
        cond, uncond = (x0_to_velocity(x, x0, sigma) for x0 in answers)
        return velocity_to_x0(x, self.guide(cond, uncond, guidance_scale), sigma)

    def matching_questions(self, settings: MatchingLoss, points: Renoised, sigma: Tensor) -> Questions:
        """The questions of distribution matching at `points`, re-noised data that the student made at `sigma`."""
        return Questions(
            self.teacher_queries(points.x, points.tau, settings.guidance_scale),
            [points.query(self.for_fake(sigma))],
        )

    @cached_property
    def points_of_matching(self) -> Renoised:
        """The student's output at the anchor, re-noised for DM."""
        anchor = self.anchor
        bound = anchor.sigma if self.losses.dm.bounded else None
        return renoise_output(anchor.output, self.draws, "dm", self.distill, bound=bound, end=anchor.end)

    @cached_property
    def points_of_guidance(self) -> tuple[Renoised, Tensor]:
        """The student's data at the anchor, re-noised for CA, and the rows where that is not DM's point.

        CA wants tau ~ U(0, b) with b below DM's bound B: where DM's own draw fell below b it is such a draw, so CA
        takes DM's point, and another draw elsewhere. Each keeps its distribution, and the teacher is asked once. With a
        point of its own (`ca.point`) CA never does.
        """
        ca, dm, sigma = self.losses.ca, self.losses.dm, self.anchor.sigma
        whole = torch.ones_like(sigma)
        bound, dm_bound = (sigma if each.bounded else whole for each in (ca, dm))
        shared = (self.draws.uniform("dm_tau") * dm_bound <= bound) & (bound <= dm_bound)
        if not dm.weight or ca.point == "own":
            shared = torch.zeros_like(shared)
        fresh, matching = self.renoised(self.anchor.output, "ca", bound), self.points_of_matching
        wide = expand(shared, fresh.x)
        points = Renoised(
            torch.where(wide, matching.x, fresh.x),
            torch.where(shared, matching.tau, fresh.tau),
            torch.where(wide, matching.noise, fresh.noise),
        )
        return points, torch.nonzero(~shared)[:, 0]


def matching_loss(
    context: Context, settings: MatchingLoss, x0: Tensor, points: Renoised, answers: Answers
) -> Tensor:
    """The loss of distribution matching at the student's `x0`, from the answers to `matching_questions`."""
    x0_real = context.guided_answer(answers.teacher, points.x, points.tau, settings.guidance_scale)
    return direction_loss(x0, matching_direction(x0, x0_real, answers.fake[0], context.losses.min_norm))


def _distance(x0_real: Tensor, x0: Tensor) -> dict[str, float]:
    """How far the teacher's data are from the student's, for the log."""
    return {"x0_distance": float((x0_real - x0.detach()).abs().mean())}


def matching(context: Context) -> Term:
    """DM: distribution matching at the anchor (paper, section 3.2)."""
    dm, anchor = context.losses.dm, context.anchor
    x0, points = anchor.x0, context.points_of_matching
    answers = yield context.matching_questions(dm, points, anchor.sigma)
    loss = matching_loss(context, dm, x0, points, answers)
    return Outcome(loss, _distance(answers.teacher[0], x0))


def guidance(context: Context) -> Term:
    """CA: the direction of classifier-free guidance at the anchor (paper, section 3.2)."""
    ca, anchor = context.losses.ca, context.anchor
    x0 = anchor.x0
    points, rows = context.points_of_guidance
    with_prompt = points.query(anchor.conditioning, rows)
    answers = yield Questions([points.query(context.no_prompt(x0)), with_prompt])
    x0_uncond, x0_rows = answers.teacher
    x0_cond = answers.before["dm"].teacher[0] if "dm" in answers.before else torch.empty_like(x0)
    x0_cond = x0_cond.index_copy(0, rows, x0_rows)
    scale = ca.scale * expand(anchor.sigma**ca.fade, x0) if ca.fade else ca.scale
    direction = guidance_direction(x0, x0_cond, x0_uncond, scale, context.losses.min_norm)
    return Outcome(direction_loss(x0, direction), _distance(x0_cond, x0))


def extrapolate(context: Context) -> tuple[Tensor, Tensor]:
    """The student's x0, with a graph, off its trajectory, and the noise level (batch,) there (paper, section 3.3).

    The point is extrapolated along the student's own velocity at the anchor, without a gradient.
    """
    anchor = context.anchor
    assert anchor.velocity is not None
    limits = context.distill.renoise_min, context.distill.renoise_max
    sigma = off_trajectory_levels(context.schedule, context.draws.uniform("off"), limits)
    x = euler_step(anchor.x, anchor.velocity.detach(), anchor.sigma, sigma)
    return velocity_to_x0(x, context.velocity("student", x, sigma, anchor.conditioning), sigma), sigma


def matching_off_trajectory(context: Context) -> Term:
    """CDM: distribution matching off the trajectory (paper, section 3.3)."""
    cdm = context.losses.cdm
    x0, sigma = extrapolate(context)
    points = context.renoised(x0.detach(), "cdm", sigma if cdm.bounded else None)
    answers = yield context.matching_questions(cdm, points, sigma)
    return Outcome(matching_loss(context, cdm, x0, points, answers), {})


def score_gradient_matching(context: Context) -> Term:
    """SGMD: the gradient of the difference of the scores in the fake score's input (arXiv 2605.30116).

    The fake score's parameters get none of it.
    """
    sgmd, anchor = context.losses.sgmd, context.anchor
    x0 = anchor.x0
    points = context.renoised(x0.detach(), "sgmd", anchor.sigma if sgmd.bounded else None)
    answers = yield Questions(context.teacher_queries(points.x, points.tau, sgmd.guidance_scale))
    x0_real = context.guided_answer(answers.teacher, points.x, points.tau, sgmd.guidance_scale)
    x, tau = points.x.requires_grad_(), points.tau
    x0_fake = velocity_to_x0(x, context.velocity("fake", x, tau, context.for_fake(anchor.sigma)), tau)
    gradient = score_gradient(x0.detach(), x0_real, x0_fake.detach(), tau, sgmd.regulariser)
    (gradient,) = torch.autograd.grad(x0_fake, x, gradient)
    return Outcome(direction_loss(x0, -0.5 * (1 - expand(tau, x0)) * gradient), {})


def consistency(context: Context) -> Term:
    """Consistency: the student's predicted data are constant along the teacher's flow (sCM, arXiv 2410.11081)."""
    settings, anchor = context.losses.consistency, context.anchor
    x, sigma, conditioning = anchor.x, anchor.sigma, anchor.conditioning
    assert anchor.velocity is not None
    answers = yield Questions(context.teacher_queries(x, sigma, settings.guidance_scale))
    flow = x0_to_velocity(x, context.guided_answer(answers.teacher, x, sigma, settings.guidance_scale), sigma)
    step = sigma.clamp(max=settings.step)
    velocity = anchor.velocity.detach()

    def student(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return context.velocity("student", x, sigma, conditioning)

    change = velocity_change(student, x, sigma, conditioning, velocity, flow, step)
    share = min(1.0, (context.updates_done + 1) / settings.warmup) if settings.warmup else 1.0
    direction = consistency_direction(velocity, flow, change, sigma, step, share)
    return Outcome(direction_loss(anchor.x0, direction), {})


def regression(context: Context) -> Term:
    """DMD's regression: the one-step sample from a pair's noise is fitted to the teacher's sample (arXiv
    2311.18828)."""
    assert context.pairs is not None
    yield Questions()
    noise, latents, conditioning = context.pairs(context.draws)
    sigma = noise.new_ones(len(noise))
    x0 = velocity_to_x0(noise, context.velocity("student", noise, sigma, conditioning), sigma)
    return Outcome(direction_loss(x0, latents - x0.detach()), {})


TERMS: dict[str, Callable[[Context], Term]] = {
    "dm": matching,
    "ca": guidance,  # behind DM, whose answers it shares
    "cdm": matching_off_trajectory,
    "sgmd": score_gradient_matching,
    "consistency": consistency,
    "regression": regression,
}
"""The function of each term of `cdm.params.Losses`, in the order in which they ask."""

Ask = Callable[[Role, list[Query]], list[Tensor]]
"""x0 of a network at each query, all in one call."""


def evaluate_terms(context: Context, ask: Ask) -> dict[str, Outcome]:
    """The outcomes of the terms that have a weight, by name; each network is asked once for all of them."""
    asking = {name: term(context) for name, term in TERMS.items() if name in context.losses.terms}
    questions = {name: next(term) for name, term in asking.items()}
    x0_real = iter(ask("teacher", [query for each in questions.values() for query in each.teacher]))
    x0_fake = iter(ask("fake", [query for each in questions.values() for query in each.fake]))
    answers: dict[str, Answers] = {}
    outcomes = {}
    for name, term in asking.items():
        asked = questions[name]
        real, fake = list(islice(x0_real, len(asked.teacher))), list(islice(x0_fake, len(asked.fake)))
        answers[name] = Answers(real, fake, dict(answers))
        outcomes[name] = _conclude(term, answers[name])
    return outcomes


def _conclude(term: Term, answers: Answers) -> Outcome:
    """The outcome of a term, once its questions are answered."""
    try:
        term.send(answers)
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome
    raise RuntimeError("a term asks once")
