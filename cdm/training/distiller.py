"""Continuous-time distribution matching, one round of updates at a time (paper, section 3 and algorithm 1).

A round is `student_every` updates of the fake score and one of the student. Work is shared within it, without
changing the expectation of any gradient: the rollout stops at each sample's anchor; one rollout serves the
round; the student's prediction at the anchor, made once and with its graph, serves the fake score's target, CA,
DM and the extrapolation; with `ca.point: shared`, wherever DM's noise level also suits CA, both use the teacher's
prediction at the same point; the teacher is called once for all terms, and so is the fake score.

The methods that CDM is compared with are settings of the same round: other schedules, other terms, a guided teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cdm.flow import velocity_to_x0
from cdm.losses import fake_score_loss, guided, state_data_loss, state_score_loss
from cdm.params import Distill, Schedule
from cdm.randomness import Draws
from cdm.rollout import Conditioning, simulate
from cdm.schedule import draw_rollouts
from cdm.training.networks import Networks, Role
from cdm.training.optim import Learner, blend
from cdm.training.points import Anchor, Query, renoise_output, with_level
from cdm.training.terms import Context, Guide, Outcome, PairSource, evaluate_terms

Metrics = dict[str, float]
"""Figures of a round, for the log."""


class Distiller:
    """The training step: networks and optimisers in, one round of updates after another.

    `prompts(iteration, samples)` gives the conditioning of the samples with these indices in the whole batch, `empty`
    that of the empty prompt (one row), and `pairs(draws)` those of a regression. `guide` is the teacher's rule of
    guidance on velocities (`Family.guide`). At most `micro_batch` samples go through a forward and backward pass at
    once, in parts that differ by one sample at most; every sample counts alike. `most` is the
    largest of a number over processes that must call a network equally often.
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
        pairs: PairSource | None = None,
        guide: Guide = guided,
        micro_batch: int | None = None,
        device: torch.device = torch.device("cpu"),
        most: Callable[[int], int] = int,
    ) -> None:
        self.networks, self.student, self.fake = networks, student, fake
        self.distill, self.schedule, self.shift, self.seed = distill, schedule, shift, seed
        self.prompts, self.empty, self.latent_shape, self.device = prompts, empty, tuple(latent_shape), device
        self.pairs, self.guide, self.most = pairs, guide, most
        self.count = len(samples)
        self.parts = parts_of(samples, micro_batch)

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
        """The random numbers of an iteration, for the samples with these indices in the whole batch."""
        return Draws(self.seed, iteration, samples, self.device)

    def draws_of_fake(self, iteration: int, samples: Sequence[int]) -> Draws:
        """Those of a fake-score update: with `fake_draws` mirrored, of every second one those before it, mirrored."""
        place = iteration % self.distill.student_every
        if self.distill.fake_draws == "mirrored" and place % 2:
            return self.draws(iteration - 1, samples).mirror()
        return self.draws(iteration, samples)

    def velocity(self, role: Role) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """The velocity field of a network."""
        return lambda x, sigma, conditioning: self.networks.velocity(role, x, sigma, conditioning)

    def share(self, anchor: Anchor) -> float:
        """The part of this process's samples that are at an anchor: the weight of its mean in theirs."""
        return len(anchor.samples) / self.count

    # Steps 1 and 2: schedule and rollout.

    def roll_out(self, iteration: int, samples: Sequence[int], serves_student: bool) -> Anchor:
        """Anchors of `samples` on trajectories of the present student."""
        draws = self.draws(iteration, samples)
        conditioning = self.prompts(iteration, samples)
        rollouts = draw_rollouts(self.schedule, self.shift, draws)
        noise = draws.normal("noise", self.latent_shape)
        calls = self.most(max(rollouts.depth))
        with self.networks.casting_once():
            x = simulate(self.velocity("student"), noise, conditioning, rollouts, calls)
        # With several parts their graphs would be alive together: the prediction is made again when needed.
        keeps_graph = serves_student and len(self.parts) == 1 and self.distill.losses.at_anchor
        end = rollouts.next_sigma if self.schedule.ends == "next" else None
        return Anchor(x, rollouts.anchor_sigma, conditioning, samples, keeps_graph, end=end)

    def predict(self, anchor: Anchor, with_graph: bool) -> None:
        """Predicts the student's velocity at the anchor, unless it is there already."""
        if anchor.velocity is None or (with_graph and not anchor.velocity.requires_grad):
            with torch.set_grad_enabled(with_graph):
                anchor.velocity = self.networks.velocity("student", anchor.x, anchor.sigma, anchor.conditioning)

    # Step 3: the fake score learns the distribution that the student generates.

    def update_fake(self, iteration: int, anchors: list[Anchor]) -> Metrics:
        """One flow-matching update on the anchors' output, then a step towards the student's weights."""
        total = 0.0
        for anchor in anchors:
            self.predict(anchor, with_graph=anchor.keeps_graph)
            loss = self.share(anchor) * self.fake_loss(anchor, self.draws_of_fake(iteration, anchor.samples))
            self.networks.backward("fake", loss)
            total += float(loss.detach())
        lr, norm = self.fake.lr, self.fake.step()
        shared = [self.fake.parameters[name] for name in self.student.parameters]
        blend(shared, self.student.parameters.values(), self.distill.merge)
        return {"loss_fake": total, "grad_norm_fake": norm, "lr_fake": lr}

    def fake_loss(self, anchor: Anchor, draws: Draws) -> Tensor:
        """The fake score's loss on what the student made at the anchor: a scalar."""
        distill, output = self.distill, anchor.output
        bound = anchor.sigma if distill.fake_bounded else None
        points = renoise_output(output, draws, "fake", distill, bound=bound, end=anchor.end, level="sigma")
        conditioning = with_level(anchor.conditioning, anchor.sigma, distill)
        velocity = self.networks.velocity("fake", points.x, points.tau, conditioning)
        if anchor.end is None:
            return fake_score_loss(velocity, output, points.noise)
        if distill.fake_target == "score":
            return state_score_loss(velocity, output, points.noise, anchor.end, points.tau)
        return state_data_loss(velocity, points.x, anchor.x0.detach(), points.tau)

    # Step 4: the student moves where teacher and fake score differ.

    def update_student(self, iteration: int, anchors: list[Anchor]) -> Metrics:
        """One update of the student on the weighted sum of its terms."""
        weights = self.distill.losses.weights
        metrics: Metrics = {}
        for anchor in anchors:
            outcomes = self.student_terms(anchor, self.draws(iteration, anchor.samples))
            parts = [weights[name] * outcome.loss for name, outcome in outcomes.items()]
            share = self.share(anchor)
            self.networks.backward("student", share * torch.stack(parts).sum())
            for name, value in figures(anchor, outcomes).items():
                metrics[name] = metrics.get(name, 0.0) + share * value
        lr = self.student.lr
        return metrics | {"grad_norm_student": self.student.step(), "lr_student": lr}

    def student_terms(self, anchor: Anchor, draws: Draws) -> dict[str, Outcome]:
        """The terms that have a weight, by name: each a scalar loss with a graph to the student."""
        self.predict(anchor, with_graph=self.distill.losses.at_anchor)
        return evaluate_terms(self.context(anchor, draws), self.ask)

    def context(self, anchor: Anchor, draws: Draws) -> Context:
        """What the terms work on at an anchor."""
        return Context(
            anchor,
            draws,
            self.networks,
            self.distill,
            self.schedule,
            self.empty,
            self.pairs,
            self.guide,
            self.student.updates_done,
        )

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


def parts_of(samples: Sequence[int], most: int | None) -> list[Sequence[int]]:
    """The samples in as few parts as can be of `most` samples each (None: all), as equal as can be."""
    count = -(-len(samples) // (most or len(samples)))
    ends = [len(samples) * part // count for part in range(count + 1)]
    return [samples[start:end] for start, end in pairwise(ends)]


def figures(anchor: Anchor, outcomes: dict[str, Outcome]) -> Metrics:
    """Figures of a student update for the log: noise level of the anchors, spread of the data, losses."""
    found = {"sigma": float(anchor.sigma.mean()), "x0_deviation": float(anchor.x0.detach().std())}
    for outcome in outcomes.values():
        found |= outcome.statistics
    return found | {f"loss_{name}": float(outcome.loss.detach()) for name, outcome in outcomes.items()}
