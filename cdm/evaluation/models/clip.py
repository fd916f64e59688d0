"""CLIP: features of pictures, and how well a picture fits its prompt (CLIPScore, PickScore, HPS, aesthetics)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm.errors import CdmError
from cdm.evaluation.models.base import pretrained, read_weights, square


class Clip:
    """A transformers CLIPModel with its own preprocessing and tokeniser. Raises CdmError.

    As a model of features it gives the unit embeddings of whole pictures, as CMMD takes them (Jayasumana et al. 2024).
    """

    def __init__(self, folder: Path, device: torch.device, name: str) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.device, self.name = device, name
        self.description = f"image embeddings of CLIP ({name})"
        self.model = pretrained(CLIPModel, folder, device)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.side: int = self.processor.crop_size["height"]
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.length: int = self.model.config.text_config.max_position_embeddings

    def __call__(self, images: Tensor) -> Tensor:
        return self.images(images, whole=True)

    @property
    def logit_scale(self) -> float:
        """Factor of cosines in the model's own training loss (100 for most)."""
        return float(self.model.logit_scale.exp())

    @torch.inference_mode()
    def images(self, images: Tensor, *, whole: bool = False) -> Tensor:
        """Unit vectors of pictures, uint8 (n, 3, height, width): float64 (n, d).

        `whole` squeezes the picture into the model's square instead of cutting its centre out of it.
        """
        options = square(self.processor) if whole else {}
        pixels = self.processor(
            list(images), return_tensors="pt", input_data_format="channels_first", **options
        ).pixel_values
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).cpu().double(), dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, cut to what the model can read: float64 (n, d)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(pooled).cpu().double(), dim=1)


class TextFit:
    """A function of the cosine between the embeddings of a picture and of its prompt."""

    def __init__(self, clip: Clip, scale: Callable[[Tensor], Tensor], description: str) -> None:
        self.clip, self.scale, self.description = clip, scale, description

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = list(dict.fromkeys(prompts))  # pictures of one prompt share its embedding
        rows = [texts.index(prompt) for prompt in prompts]
        return self.scale((self.clip.images(images) * self.clip.texts(texts)[rows]).sum(1))


def clip_score(clip: Clip) -> TextFit:
    """CLIPScore (Hessel et al. 2021) on the scale of most publications: 100 times the cosine, at least 0."""
    return TextFit(
        clip, lambda cosine: 100 * cosine.clamp(min=0), f"100 cos(picture, prompt), CLIP ({clip.name})"
    )


def pick_score(clip: Clip) -> TextFit:
    """PickScore (Kirstain et al. 2023): the cosine times the model's own scale; about 20 to 23."""
    scale = clip.logit_scale
    return TextFit(
        clip, lambda cosine: scale * cosine, f"{scale:.4g} cos(picture, prompt), PickScore ({clip.name})"
    )


def hps(clip: Clip) -> TextFit:
    """Human preference score v2 (Wu et al. 2023): the cosine; about 0.2 to 0.35."""
    return TextFit(clip, lambda cosine: cosine, f"cos(picture, prompt), HPS v2 ({clip.name})")


class AestheticHead:
    """The layers of the LAION aesthetic predictor behind CLIP, each (weight, bias), float64.

    `path`: a file of weights whose names hold the number of each layer, such as `layers.0.weight`. Raises CdmError.
    """

    def __init__(self, path: Path, device: torch.device, name: str = "") -> None:
        self.path = path
        weights = {name: tensor.double() for name, tensor in read_weights(path).items()}
        names = {name.rpartition(".")[0] for name in weights}
        try:
            ordered = sorted(names, key=lambda name: int(name.rpartition(".")[2]))
            self.layers = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ordered]
        except (KeyError, ValueError):
            raise CdmError(
                f"{path}: not an aesthetic head: its weights are no numbered linear layers"
            ) from None


class Aesthetic:
    """The LAION aesthetic predictor: linear layers on the unit embedding of CLIP ViT-L/14; about 1 to 10.

    Raises CdmError where the layers of `head` do not fit the model or each other.
    """

    def __init__(self, clip: Clip, head: AestheticHead) -> None:
        self.clip, self.layers = clip, head.layers
        self.description = f"{head.path.name} on CLIP ({clip.name})"
        width = clip.model.config.projection_dim
        widths = [width, *(len(weight) for weight, _ in self.layers)]
        if [weight.shape[1] for weight, _ in self.layers] != widths[:-1] or widths[-1] != 1:
            raise CdmError(
                f"{head.path}: layers of {widths} do not lead from CLIP's {width} features to one score"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        hidden = self.clip.images(images)
        for weight, bias in self.layers:
            hidden = F.linear(hidden, weight, bias)
        return hidden[:, 0]
