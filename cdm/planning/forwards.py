"""Forward passes of a training, in closed form: means over the schedule, the same for every model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cdm.params import Distill, Schedule


@dataclass(frozen=True)
class Forwards:
    """Forwards without a graph, and with one: of a sample, or of a whole training."""

    plain: float
    with_graph: float

    @property
    def equivalents(self) -> float:
        """In forwards, one with its backward counting 3."""
        return self.plain + 3 * self.with_graph


def mean_depth(schedule: Schedule) -> float:
    """Mean number of steps to a sample's anchor: uniform over 0..N-1 of a schedule of N levels."""
    if schedule.kind == "fixed":
        return (len(schedule.sigmas) - 1) / 2
    return ((schedule.min_len + schedule.max_len) / 2 - 1) / 2


def first_share(schedule: Schedule) -> float:
    """Share of anchors that are pure noise: the mean of 1/N."""
    if schedule.kind == "fixed":
        return 1 / len(schedule.sigmas)
    lengths = range(schedule.min_len, schedule.max_len + 1)
    return sum(1 / length for length in lengths) / len(lengths)


def mean_anchor_sigma(schedule: Schedule, shift: float) -> float:
    """Mean level of an anchor after the shift.

    An inner level of a dynamic schedule, chosen at random, is uniform over the range whatever the spacing.
    """

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if schedule.kind == "fixed":
        return sum(map(shifted, schedule.sigmas)) / len(schedule.sigmas)
    low, high, a = schedule.sigma_min, schedule.sigma_max, shift - 1
    if abs(a) < 1e-6:
        inner = (low + high) / 2
    else:
        inner = shift / a - shift / a**2 * math.log((1 + a * high) / (1 + a * low)) / (high - low)
    first = first_share(schedule)
    return first + (1 - first) * inner


def unshared_samples(distill: Distill, schedule: Schedule, shift: float) -> float:
    """Share of samples at which CA's re-noised point is not DM's, so that the teacher is called at both points."""
    ca, dm = distill.losses.ca, distill.losses.dm
    if not ca.weight:
        return 0.0
    if not dm.weight or ca.point == "own":
        return 1.0
    if ca.bounded == dm.bounded:
        return 0.0
    return 1 - (first_share(schedule) if dm.bounded else mean_anchor_sigma(schedule, shift))


def keeps_graph(parts: int) -> bool:
    """Whether the student's graph at the anchor is kept from the fake score's updates for its own: graphs of several
    parts would be alive together."""
    return parts == 1


def forwards_of_round(
    distill: Distill, schedule: Schedule, shift: float, *, parts: int = 1, learns: bool = True
) -> Forwards:
    """Forwards a sample in a round of `student_every` iterations; `parts` micro-batches a process.

    `learns` is False in the rounds of the fake score alone.
    """
    losses, every = distill.losses, distill.student_every
    kept = learns and losses.at_anchor and keeps_graph(parts)
    if losses.ask_fake:
        rollouts = 1 if distill.rollouts == "shared" else every
        plain = rollouts * (mean_depth(schedule) + 1) - kept  # with the student at each anchor
        with_graph = float(every + kept)  # the fake score's updates
        again = learns and losses.at_anchor and not kept
    else:
        plain, with_graph, again = mean_depth(schedule), 0.0, learns and losses.at_anchor
        plain += learns and not losses.at_anchor
    with_graph += again
    if learns:
        unshared = unshared_samples(distill, schedule, shift)
        for needs in losses.needs.values():
            plain += needs.teacher - needs.teacher_shared + unshared * needs.teacher_shared
            plain += needs.fake + needs.student
            with_graph += needs.student_graph + needs.fake_graph
    return Forwards(plain, with_graph)


def forwards_of_training(distill: Distill, schedule: Schedule, shift: float, *, parts: int = 1) -> Forwards:
    """Forwards of a whole training, of all samples together."""
    rounds = distill.iterations // distill.student_every
    before = min(distill.fake_only // distill.student_every, rounds)
    alone, both = (
        forwards_of_round(distill, schedule, shift, parts=parts, learns=learns) for learns in (False, True)
    )
    return Forwards(
        distill.batch_size * (before * alone.plain + (rounds - before) * both.plain),
        distill.batch_size * (before * alone.with_graph + (rounds - before) * both.with_graph),
    )
