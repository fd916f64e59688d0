"""A few kills of each kind, through DVC itself; `python -m tests.kills` has as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills import KINDS, kill_often


@pytest.mark.slow
def test_nothing_is_lost_by_kills(tiny_sd3: Path, tmp_path: Path) -> None:
    report = kill_often(tmp_path / "world", tiny_sd3, KINDS)
    assert not report.problems, str(report)
    assert report.kills.total() == len(KINDS)
