"""Our measures agree with the packages that others use, where these are installed: benchmarks/agreement.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import agreement

NEEDED = ("torch_fidelity", "lpips", "prdc", "vendi_score", "open_clip", "torchvision")
MISSING = [name for name in NEEDED if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_every_figure_is_the_reference_s(tmp_path: Path) -> None:
    """To five digits; float32 networks end somewhere behind the sixth."""
    found = list(agreement.rows(tmp_path))
    for row in found:
        assert row.known or row.difference < 1e-5, row
    assert {row.measure for row in found if row.known and row.difference > 1e-3} == {
        "HPS, curly quotation marks"
    }
    assert len(found) > 20
    assert min(row.theirs for row in found if row.measure.startswith("CLIPScore")) > 0.1
