"""Sets of prompts: their texts and, where they are stored, their embeddings by the teacher's text encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.families.common import check_finite
from cdm.params import Prompts
from cdm.system.device import DTYPES
from cdm.system.files import digest_of

if TYPE_CHECKING:  # a set of texts needs no architecture
    from cdm.families import Conditioning, Family

TEXTS = "texts.json"


class PromptSet:
    """A folder of prompts: their texts and, unless they are to be encoded online, their conditioning.

    Raises CdmError if the folder is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = _read_texts(folder / TEXTS)
        self.store = Store(folder) if (folder / MANIFEST).exists() else None
        if self.store is not None and len(self.store) != len(self.texts):
            raise CdmError(
                f"{folder}: {len(self.texts)} texts, but {len(self.store)} rows: run the stage `prompts`"
            )
        if self.store is not None and self.store.fact("prompts_sha256", str) != self.sha256:
            raise CdmError(
                f"{folder / TEXTS}: not the texts whose embeddings lie beside it: run the stage `prompts` again"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hash of the texts in their order."""
        return digest_of(self.texts)

    def conditioning(self, indices: Sequence[int], device: torch.device | None = None) -> Conditioning:
        """The conditioning of the prompts `indices`, one row each; numbers as float32, whatever they are stored in.

        Raises CdmError if the set holds texts only (`prompts.embed: online`).
        """
        if self.store is None:
            raise CdmError(
                f"{self.folder}: holds texts only: run the stage `prompts` with prompts.embed cached"
            )
        return as_float32(self.store.rows(indices), device)


def _read_texts(path: Path) -> list[str]:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise CdmError(f"{path}: missing or damaged: run the stage `prompts` again")
    return texts


def as_float32(conditioning: Conditioning, device: torch.device | None) -> Conditioning:
    """The conditioning on `device` with its numbers as float32; masks stay."""
    return {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in conditioning.items()
    }


class OnlinePrompts:
    """A `PromptSet` of texts only (`prompts.embed: online`), encoded when they are asked for."""

    def __init__(
        self, texts: PromptSet, family: Family, source: Path, settings: Prompts, *, offload: bool
    ) -> None:
        self.texts, self.family, self.source = texts, family, source
        self.length = settings.max_sequence_length
        self.offload = offload
        self.pipeline = family.load_pipeline(
            source, image=False, transformer=False, dtype=DTYPES[settings.precision]
        )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hash of the texts in their order."""
        return self.texts.sha256

    def conditioning(self, indices: Sequence[int], device: torch.device | None = None) -> Conditioning:
        """The conditioning of the prompts `indices`, one row each, numbers as float32.

        The encoders move to `device`, and with `offload` back again.
        """
        return as_float32(self.encoded(indices, device, len(indices)), device)

    def encoded(self, indices: Sequence[int], device: torch.device | None, at_once: int) -> Conditioning:
        """The same as the encoders give it, on the CPU. They move once, and read `at_once` prompts at a time."""
        encoders = self.pipeline if device is None else self.pipeline.to(device)
        texts = [self.texts.texts[i] for i in indices]
        parts = [
            self.family.encode(encoders, texts[start : start + at_once], self.length)
            for start in range(0, len(texts), at_once)
        ]
        encoded = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        check_finite(encoded, encoders, self.source, "prompts.precision")
        if self.offload:
            self.pipeline.to("cpu")
        return encoded
