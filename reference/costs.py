"""Forwards that an iteration takes, counted on networks that cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdm.params import Schedule
from reference.world import build, distill_settings

BATCH = 48
AUTHORS = Schedule(kind="dynamic", min_len=1, max_len=28, sigma_min=0.25, sigma_max=0.95, spacing="independent")
"""The rollouts of the paper's authors, as released: N ~ U{1..28}."""


@dataclass
class Cost:
    """Of an iteration (a fake-score update and half a student update)."""

    forwards: float
    with_graph: float
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def equivalents(self) -> float:
        return self.forwards + 3 * self.with_graph


def count(
    kind: Callable[..., Any],
    schedule: Schedule,
    rollouts: str,
    rounds: int = 40,
    micro_batch: int | None = None,
    **changes: Any,
) -> Cost:
    """Forwards a sample and iteration, from rounds of the real engine on networks that cost nothing.

    `changes` are settings of `distill`.
    """
    distill = distill_settings(rollouts=rollouts, batch_size=BATCH, **changes)
    distiller, networks = build(
        kind, distill=distill, schedule=schedule, samples=range(BATCH), micro_batch=micro_batch
    )
    for number in range(rounds):
        distiller.round(distill.student_every * number)
    samples = rounds * distill.student_every * BATCH
    with_graph = sum(n for key, n in networks.samples.items() if key.endswith("+graph"))
    return Cost((networks.samples.total() - with_graph) / samples, with_graph / samples)
