"""DINOv2: features that follow what pictures show better than Inception's (Stein et al. 2023)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cdm.evaluation.models.base import pretrained, square


class Dinov2Features:
    """The class token of a transformers Dinov2Model; pictures are squeezed into its square. Raises CdmError."""

    def __init__(self, folder: Path, device: torch.device, name: str) -> None:
        from transformers import BitImageProcessorPil, Dinov2Model

        self.device = device
        self.model = pretrained(Dinov2Model, folder, device)
        self.processor = BitImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.side: int = self.processor.crop_size["height"]
        self.description = f"class tokens of DINOv2 ({name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.processor(
            list(images),
            **square(self.processor),
            input_data_format="channels_first",
            return_tensors="pt",
        ).pixel_values
        hidden = self.model(pixel_values=pixels.to(self.device)).last_hidden_state
        return hidden[:, 0].cpu().double()
