"""LPIPS (Zhang et al. 2018) with AlexNet: the distance of two pictures in what the network's layers see."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.evaluation.models.base import fill, read_weights
from cdm.evaluation.samples import parts

BACKBONE, LINEAR = "alexnet-owt-7be5be79.pth", "alex.pth"
"""The two files of the folder: torchvision's AlexNet, and the channels' weights of the LPIPS authors (v0.1)."""
LAYERS = (1, 4, 7, 9, 11)
"""Positions of the five rectified layers in torchvision's AlexNet."""


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class Lpips:
    """Embeds pictures so that LPIPS is a squared Euclidean distance. Raises CdmError.

    LPIPS is, summed over layers, the mean over places of `sum_c w_c (a_c - b_c)^2`, with a and b the activations
    divided by their length over channels: the squared distance of `sqrt(w_c / places) a_c`.
    """

    def __init__(self, folder: Path, device: torch.device, name: str = "") -> None:
        weights = read_weights(folder / BACKBONE)
        features = {
            name.removeprefix("features."): weight
            for name, weight in weights.items()
            if name.startswith("features.")
        }
        self.network = fill(_alexnet(), features, folder / BACKBONE).to(device)
        linear = read_weights(folder / LINEAR)
        try:
            weights_of = [linear[f"lin{i}.model.1.weight"] for i in range(len(LAYERS))]
        except KeyError as error:
            raise CdmError(f"{folder / LINEAR}: not the channels' weights of LPIPS: no {error}") from None
        self.weights = [weight.clamp(min=0).to(device) for weight in weights_of]
        self.device = device
        self.mean = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
        self.deviation = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]
        self.description = "AlexNet, v0.1"

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Pictures, uint8 (n, 3, height, width), as float32 (n, features)."""
        hidden = (images.to(self.device).float() / 127.5 - 1 - self.mean) / self.deviation
        parts = []
        for position, layer in enumerate(self.network):
            hidden = layer(hidden)
            if position in LAYERS:
                places = hidden.shape[2] * hidden.shape[3]
                weight = self.weights[LAYERS.index(position)]
                parts.append(((weight / places).sqrt() * F.normalize(hidden, dim=1, eps=1e-10)).flatten(1))
        return torch.cat(parts, 1)

    def mean_distance(self, images: Tensor) -> float:
        """Mean LPIPS of all pairs of pictures; at least two.

        The mean squared distance of all pairs is `2 / (n - 1)` times the sum of squared distances to the mean: so
        embeddings, which are larger than pictures, need not be there together.
        """
        count, total, squares = len(images), torch.zeros(()), torch.zeros(())
        for part in parts(count, images.shape[1:]):
            embedded = self.embed(images[part.start : part.stop]).cpu().double()
            total = total + embedded.sum(0)
            squares = squares + embedded.square().sum()
        spread = squares - total.square().sum() / count
        return max(0.0, (2 / (count - 1) * spread).item())
