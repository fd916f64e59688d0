"""Interfaces of the models that measures use, and reading of weights: safetensors, or plain tensors of a torch file."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm.errors import CdmError

Network = TypeVar("Network", bound=nn.Module)


class FeatureModel(Protocol):
    """Turns pictures, uint8 (n, 3, height, width), into feature vectors, float64 (n, features)."""

    description: str
    """What the features are, for a reader of the report."""
    side: int
    """Pixels on a side of what the network takes; pictures are resized to it."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Crops:
    """Features of the middle of each picture at full resolution: a square as large as the network takes it.

    Nothing is resized, so that blur and noise are seen which resizing hides: patch FID, with InceptionV3's 299 pixels
    (Lin et al. 2024, SDXL-Lightning). `shape` is that of the pictures, (3, height, width); of pictures that are smaller
    the crop is the whole.
    """

    def __init__(self, model: FeatureModel, shape: Sequence[int]) -> None:
        self.model, self.side = model, model.side
        whole = min(shape[-2:]) < self.side
        what = "whole pictures, which are smaller than a crop of" if whole else "the middle of pictures,"
        self.description = f"{model.description}, of {what} {self.side} pixels"

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.side:
            return self.model(images)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        return self.model(images[..., top : top + self.side, left : left + self.side].contiguous())


class PictureScorer(Protocol):
    """Scores pictures, uint8 (n, 3, height, width), of their prompts: float64 (n,)."""

    description: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


def pretrained(model: type[Any], folder: Path, device: torch.device) -> Any:
    """The transformers model of a folder, in float32, from safetensors, with no weight missing. Raises CdmError."""
    try:
        loaded, info = model.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CdmError(f"{folder}: cannot be loaded as a {model.__name__}: {reason}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CdmError(
            f"{folder}: holds no whole {model.__name__}: {len(missing)} weights are missing ({missing[0]})"
        )
    return loaded.eval().requires_grad_(False).to(device)


def square(processor: Any) -> dict[str, Any]:
    """Options of a transformers image processor that squeeze the whole picture into what it would cut out."""
    crop = processor.crop_size
    return {"size": {"height": crop["height"], "width": crop["width"]}, "do_center_crop": False}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, or of one that `torch.save` wrote (no other objects are unpickled).

    Raises CdmError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CdmError(f"{path}: not a readable file of weights: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise CdmError(f"{path}: not a dictionary of tensors, which a file of weights is")
    return loaded


def fill(module: Network, weights: dict[str, Tensor], path: Path) -> Network:
    """`module` with exactly these weights, for inference. Raises CdmError where names or shapes differ."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CdmError(f"{path}: other weights than expected: {reason}") from None
    return module.eval().requires_grad_(False)
