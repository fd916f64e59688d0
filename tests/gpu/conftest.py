"""Tests on a GPU run where they are asked for: `pytest tests/gpu -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = "gpu" in str(config.getoption("markexpr"))
    others = [item for item in items if item.get_closest_marker("gpu") is None]
    if not wanted and len(others) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in others])
        items[:] = others


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """Convolutions without TF32, so that the CPU's numbers can be compared with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
