"""Feature extraction: from pictures to the vectors in which distances are measured, and to the attributes shown.

An extractor is anything that follows `Extractor`. Two are here: a trained judge, and statistics of the pixels
for those who have no feature model of their pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm.errors import CdmError, line
from cdm.evaluation.judge import Judge


@dataclass(frozen=True)
class Features:
    """Of n pictures; matrices are float64."""

    content: Tensor
    """(n, d): what the pictures show."""
    style: Tensor
    """(n, e): how they show it (blur, contrast, colour)."""
    logits: dict[str, Tensor]
    """(n, classes) of each attribute; empty where the extractor knows none."""

    def rows(self, indices: Tensor) -> Features:
        return Features(
            self.content[indices], self.style[indices], {k: v[indices] for k, v in self.logits.items()}
        )


class Extractor(Protocol):
    """Turns a batch of pictures, uint8 (n, 3, height, width), into features."""

    description: str
    """What the features are, for a reader of the report."""
    attributes: Mapping[str, Sequence[str]]
    """Class names of each attribute that `Features.logits` holds."""

    def __call__(self, images: Tensor) -> Features: ...


class JudgeFeatures:
    """The penultimate layer of a judge as content, the statistics of its first layers as style."""

    def __init__(self, folder: Path) -> None:
        try:
            self.judge = Judge.load(folder)
        except Exception as error:  # noqa: BLE001 - a folder may hold anything
            reason = line(f"{type(error).__name__}: {error}")
            raise CdmError(f"evaluate.judge: {folder} does not hold a judge: {reason}") from None
        self.attributes: Mapping[str, Sequence[str]] = self.judge.config.attributes
        self.description = f"the judge {folder}, a classifier of {', '.join(self.attributes)}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        output = self.judge(images.float() / 255)
        return Features(output.features.double(), output.style.double(), output.logits)


class PixelFeatures:
    """Features without a model: coarse composition as content, the strength of detail as style.

    Content is the picture averaged to 8x8 cells (192 features); style is, for each colour, mean, deviation, and
    in each of up to five octaves mean and deviation of the absolute detail (what halving the size loses). They
    see layout, colour, blur and contrast, and know nothing of objects.
    """

    description = (
        "statistics of the pixels (no feature model): layout, colour, sharpness and contrast, not objects"
    )
    attributes: Mapping[str, Sequence[str]] = {}
    cells = 8
    octaves = 5

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        pictures = images.double() / 255
        style = [pictures.mean((2, 3)), pictures.std((2, 3))]
        level = pictures
        for _ in range(self.octaves):
            if min(level.shape[2:]) < 4:
                break
            coarse = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
            detail = (level - F.interpolate(coarse, size=level.shape[2:], mode="nearest")).abs()
            style += [detail.mean((2, 3)), detail.std((2, 3))]
            level = coarse
        content = F.adaptive_avg_pool2d(pictures, self.cells).flatten(1)
        return Features(content, torch.cat(style, dim=1), {})


def load_extractor(judge: str | None) -> Extractor:
    """The extractor that `evaluate.judge` names: that judge, or pixel statistics where it is null."""
    return PixelFeatures() if judge is None else JudgeFeatures(Path(judge))


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Features:
    """Features of all batches of pictures, joined."""
    parts = [extractor(batch) for batch in batches]
    return Features(
        torch.cat([part.content for part in parts]),
        torch.cat([part.style for part in parts]),
        {name: torch.cat([part.logits[name] for part in parts]) for name in parts[0].logits},
    )


def attribute_targets(prompts: Sequence[str], attributes: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """The class of each attribute that a prompt names as a word: (prompts,) int64; -1: it names none or two."""

    def target(prompt: str, classes: Sequence[str]) -> int:
        found = [
            i
            for i, name in enumerate(classes)
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, flags=re.IGNORECASE)
        ]
        return found[0] if len(found) == 1 else -1

    return {
        name: torch.tensor([target(prompt, classes) for prompt in prompts], dtype=torch.int64)
        for name, classes in attributes.items()
    }


def attributes_right(logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each attribute 1 where the likeliest class is the target, else 0; NaN where there is no target."""
    return {
        name: torch.where(target >= 0, (logits[name].argmax(1) == target).double(), torch.nan)
        for name, target in targets.items()
    }


def all_right(right: Mapping[str, Tensor]) -> Tensor:
    """1 where every attribute that the prompt names is right, else 0; NaN where it names none: (n,)."""
    table = torch.stack(list(right.values()))
    correct = (table.nan_to_num(1.0) == 1).all(0).double()
    return torch.where(table.isnan().all(0), torch.nan, correct)
