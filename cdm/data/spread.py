"""Choice of a few indices spread over a long list, such as the prompts of a contact sheet."""

from __future__ import annotations

GOLDEN_RATIO = 0.618034


def spread(total: int, count: int) -> list[int]:
    """One index in each of `count` equal parts of `range(total)`, or all where there are fewer.

    Neighbours in a list of prompts are often alike, and so are prompts a fixed distance apart: the place within
    each part advances by the golden ratio.
    """
    if count >= total:
        return list(range(total))
    return [int((i + (i + 1) * GOLDEN_RATIO % 1) * total / count) for i in range(count)]
