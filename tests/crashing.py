"""Trainings that crash at chosen iterations."""

from __future__ import annotations

import pytest

from cdm.training.distiller import Distiller


def crash_rounds(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> list[Distiller]:
    """Has the rounds that begin at these `iterations` fail, once each and in this order, with "crash ITERATION".

    Returns the distillers whose round has failed, so far.
    """
    real, left, crashed = Distiller.round, list(iterations), list[Distiller]()

    def round_or_crash(self: Distiller, iteration: int) -> dict[str, float]:
        if left and iteration == left[0]:
            crashed.append(self)
            raise RuntimeError(f"crash {left.pop(0)}")
        return real(self, iteration)

    monkeypatch.setattr(Distiller, "round", round_or_crash)
    return crashed
