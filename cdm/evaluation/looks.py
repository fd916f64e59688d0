"""Measures of single pictures without any model: saturation, contrast, colour cast and sharpness.

Each takes pictures, uint8 (n, 3, height, width) of sRGB, and returns a tuple of float64 (n,): a value of each picture
for each quantity of its record in cdm.measures. Pictures may be of any size: they are read in bands of rows, so that
the work takes the memory of `BAND` pixels. Sharpness compares pictures of one size only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cdm.measures import MEASURES, load

BAND = 2**20
"""Pixels of all pictures that are worked on at once."""
FLAT = 1e-6
"""RMS contrast below which a picture is of one colour, but for rounding."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601, which most programs take for grey."""
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
"""Linear sRGB to CIE XYZ (IEC 61966-2-1); the sums of its rows are the white of D65."""


def look_at(names: Sequence[str], images: Tensor) -> Tensor:
    """What the measures of these names see of pictures, uint8 (n, 3, height, width): float64 (n, values), where each
    measure has a value for each of its quantities."""
    return torch.stack([values for name in names for values in load(MEASURES[name].compute)(images)], 1)


def saturation(images: Tensor) -> tuple[Tensor]:
    """Mean saturation over the pixels: S of HSV (Smith 1978), which is (max - min) / max of red, green and blue.

    0 of grey and of black, 1 of a pure colour of any brightness.
    """

    def of_band(pixels: Tensor) -> Tensor:
        high, low = pixels.amax(1), pixels.amin(1)
        return torch.where(high > 0, (high - low) / high.clamp(min=1 / 255), 0)

    return (_mean(images, of_band),)


def contrast(images: Tensor) -> tuple[Tensor]:
    """RMS contrast (Peli 1990): the standard deviation of the luma (BT.601, 0 to 1) over the pixels.

    0 of one grey, 0.5 of half black, half white.
    """
    return (_deviation(images, _luma),)


def colour_cast(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colour of a picture in CIELAB (CIE 1976, white D65): a* (green below 0, red above), b* (blue, yellow).

    Both are 0 of greys. A difference of about 2 is seen by people who look at two fields side by side.
    """

    def of_band(pixels: Tensor) -> Tensor:
        linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055).pow(2.4))
        matrix = pixels.new_tensor(TO_XYZ)
        xyz = torch.einsum("ij,njhw->nihw", matrix / matrix.sum(1, keepdim=True), linear)
        edge = 6 / 29
        x, y, z = torch.where(xyz > edge**3, xyz.pow(1 / 3), xyz / (3 * edge**2) + 4 / 29).unbind(1)
        return torch.stack([500 * (x - y), 200 * (y - z)], 1)

    red, yellow = _mean(images, of_band).unbind(1)
    return red, yellow


def sharpness(images: Tensor) -> tuple[Tensor]:
    """Deviation of the luma's Laplacian, by the RMS contrast.

    The Laplacian is that of four neighbours; its variance is a measure of focus (Pech-Pacheco et al. 2000). The
    division is ours: a picture of more contrast is not sharper for that. 0 of one grey; blur lowers it, noise raises
    it.
    """
    whole = contrast(images)[0]

    def laplacian(pixels: Tensor) -> Tensor:
        grey = _luma(pixels)
        around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
        return 4 * grey[:, 1:-1, 1:-1] - around

    if min(images.shape[2:]) < 3:
        return (torch.zeros_like(whole),)
    detail = _deviation(images, laplacian, border=1)
    return (torch.where(whole > FLAT, detail / whole.clamp(min=FLAT), 0),)


def _luma(pixels: Tensor) -> Tensor:
    return torch.einsum("i,nihw->nhw", pixels.new_tensor(LUMA), pixels)


def _mean(images: Tensor, of_band: Callable[[Tensor], Tensor], border: int = 0) -> Tensor:
    """The mean over height and width of what `of_band` makes of bands of pixels from 0 to 1; float64, (n, ...).

    `border`: pixels on every side that it needs and makes nothing of.
    """
    parts = [
        (values.sum((-2, -1), dtype=torch.float64), values.shape[-2] * values.shape[-1])
        for values in map(of_band, _bands(images, border))
    ]
    return torch.stack([total for total, _ in parts]).sum(0) / sum(count for _, count in parts)


def _deviation(images: Tensor, of_band: Callable[[Tensor], Tensor], border: int = 0) -> Tensor:
    """The standard deviation of it, (n,)."""

    def moments(pixels: Tensor) -> Tensor:
        values = of_band(pixels).double()
        return torch.stack([values, values.square()], 1)

    mean, square = _mean(images, moments, border).unbind(1)
    return (square - mean.square()).clamp(min=0).sqrt()


def _bands(images: Tensor, border: int) -> Iterator[Tensor]:
    """Rows of pictures as float32 from 0 to 1, some at a time; two that follow share twice `border`."""
    count, _, height, width = images.shape
    rows = max(1, BAND // (count * width))
    for top in range(0, height - 2 * border, rows):
        yield images[:, :, top : min(top + rows + 2 * border, height)].float() / 255
