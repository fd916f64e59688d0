"""InceptionV3 as FID takes it: the network of the TensorFlow release of 2015, whose pooling and resizing differ from
later ones. Layers are named as in the weights `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity (and
`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid), which are this network's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm.evaluation.models.base import fill, read_weights

SIDE = 299
FEATURES, CLASSES = 2048, 1008

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel]
"""Channels out and kernel of a convolution that keeps the size of the picture."""
Branch = Sequence[Layer | list[Layer]]
"""Convolutions one after the other; a list at the end stands side by side, their channels joined."""


class _Convolution(nn.Module):
    def __init__(
        self, channels_in: int, channels_out: int, kernel: Kernel, *, stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """The mean of what lies under the window, which at a border is less than nine pixels."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _Mixed(nn.Module):
    """Branches on one input, their channels joined, the last one of pooled pixels.

    With `halve` the last convolution of each branch and the pooling halve the picture, without padding, and the
    pooled channels are passed on as they are; else they go through a convolution to `pooled` channels.
    """

    def __init__(
        self,
        channels: int,
        branches: dict[str, Branch],
        pooled: int = 0,
        pool: Callable[[Tensor], Tensor] = _average,
        *,
        halve: bool = False,
    ) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []
        self.pool = pool
        for name, branch in branches.items():
            width = channels
            path: list[list[str]] = []
            for number, step in enumerate(branch, 1):
                place = name if len(branch) == 1 else f"{name}_{number}"
                halves = halve and number == len(branch)
                layers = (
                    {place + "ab"[i]: layer for i, layer in enumerate(step)}
                    if isinstance(step, list)
                    else {place: step}
                )
                for each, (out, kernel) in layers.items():
                    made = _Convolution(width, out, kernel, stride=2 if halves else 1, pad=not halves)
                    self.add_module(each, made)
                width = sum(out for out, _ in layers.values())
                path.append(list(layers))
            self.paths.append(path)
        self.branch_pool = _Convolution(channels, pooled, 1) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            hidden = x
            for names in path:
                hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], 1)
            outputs.append(hidden)
        pooled = F.max_pool2d(x, 3, stride=2) if self.branch_pool is None else self.branch_pool(self.pool(x))
        return torch.cat([*outputs, pooled], 1)


def _block_a(channels: int, pooled: int) -> _Mixed:
    branches: dict[str, Branch] = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(channels, branches, pooled)


def _block_c(width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    branches: dict[str, Branch] = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
    }
    return _Mixed(768, branches, 192)


def _block_e(channels: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    cross: list[Layer] = [(384, (1, 3)), (384, (3, 1))]
    branches: dict[str, Branch] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), cross],
        "branch3x3dbl": [(448, 1), (384, 3), cross],
    }
    return _Mixed(channels, branches, 192, pool)


class Inception(nn.Module):
    """Pixels (n, 3, 299, 299) in [-1, 1] to pooled features (n, 2048); `fc` is kept for the weights' sake."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _Mixed(
            288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, halve=True
        )
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _Mixed(
            768,
            {
                "branch3x3": [(192, 1), (320, 3)],
                "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
            },
            halve=True,
        )
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _largest)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = pixels
        for name, layer in self.named_children():
            if name == "fc":
                continue
            hidden = layer(hidden)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                hidden = F.max_pool2d(hidden, 3, stride=2)
        return hidden.mean((2, 3))


def resize(images: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear resizing of (n, 3, height, width) to a square as TensorFlow 1 did it.

    Pixel i of the result lies at i * size / side of the picture (not at the middle of its share), and is a mean of
    its two neighbours there, however much smaller it becomes.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = place.long()
        high = (low + 1).clamp(max=size - 1)
        share = (place - low).to(images.dtype).unflatten(0, (-1, 1) if dim == 2 else (1, -1))
        below, above = images.index_select(dim, low), images.index_select(dim, high)
        images = below + (above - below) * share
    return images


class InceptionFeatures:
    """The 2,048 pooled features that FID and KID are defined on. `path`: the weights. Raises CdmError."""

    side = SIDE

    def __init__(self, path: Path, device: torch.device, name: str = "") -> None:
        weights = read_weights(path)
        for name, layer in (network := Inception()).named_modules():
            if isinstance(layer, nn.BatchNorm2d):  # pytorch-fid's file lacks these counters, which nothing uses
                weights.setdefault(f"{name}.num_batches_tracked", torch.tensor(0))
        self.network = fill(network, weights, path).to(device)
        self.device = device
        self.description = f"pooled features of InceptionV3 ({path.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = (resize(images.to(self.device).float()) - 128) / 128
        return self.network(pixels).cpu().double()
