"""What differs between architectures, behind one interface: the rest of `cdm` never asks which model it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # what only names families, such as the check of a params file, waits for no torch
    import torch
    from torch import Tensor, nn

Conditioning = dict[str, "Tensor"]
"""What a prompt becomes: tensors (batch, ...), keyed by the transformer's own argument names where it takes them as
they are. Rows of all prompts have one shape, so that they can be stored and mixed: shorter texts are padded, and where
the transformer minds, a mask (batch, tokens), bool, says which tokens are real."""


class Family(Protocol):
    """One architecture. `source` and `folder` are local diffusers folders; sigmas follow `cdm.flow`.

    Latents are (batch, channels, height, width) everywhere; a family whose transformer takes them otherwise packs
    and unpacks in `velocity`. `resolution` is the pictures' height and width in pixels; None is the family's default.
    """

    @property
    def name(self) -> str:
        """As in `teacher.family`: the name of the family's module."""

    @property
    def pipeline_class_name(self) -> str:
        """The diffusers pipeline that draws with it."""

    @property
    def lora_targets(self) -> list[str]:
        """Names of the linear layers that LoRA adapts."""

    def load_pipeline(
        self,
        source: Path,
        *,
        text: bool = True,
        image: bool = True,
        transformer: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The diffusers pipeline, on the CPU, its own progress bar off; `dtype` None is float32.

        `text=False` leaves out the text encoders, `image=False` the autoencoder, `transformer=False` the
        transformer unless encoding needs it. Raises CdmError if the folder cannot be loaded.
        """

    def load_transformer(self, source: Path, dtype: torch.dtype | None = None) -> nn.Module:
        """The transformer alone, on the CPU, in evaluation mode. Raises CdmError if it cannot be loaded."""

    def latent_shape(self, source: Path, resolution: int | None = None) -> tuple[int, ...]:
        """Shape of one sample's latents, (channels, height, width), from the configs only.

        Raises CdmError if the model does not draw at `resolution`.
        """

    def shift(self, source: Path, resolution: int | None = None) -> float:
        """The timestep shift of the teacher's scheduler (`cdm.flow.shift_sigmas`), from the configs only."""

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        """The prompts as `velocity` takes them; `max_sequence_length` None is the family's default.

        Raises CdmError if the model does not take texts of that length.
        """

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted velocity, `noise - x0`, of `x` (batch, ...) at levels `sigma` (batch,)."""

    def embedding_width(self, conditioning: Conditioning) -> int:
        """Width of the vector that stands for a whole prompt, as `add_embedding` takes it."""

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        """The conditioning with `embedding` (batch, width) added to the vector that stands for a whole prompt."""

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance on velocities, as the teacher's pipeline does it; `scale` 1 is none."""

    def sample(
        self,
        pipeline: Any,
        noise: Tensor,
        conditioning: Conditioning,
        empty: Conditioning,
        sigmas_unshifted: list[float],
        guidance_scale: float,
    ) -> Tensor:
        """Latents that the diffusers pipeline draws from `noise` (batch, ...), whose size is the pictures'.

        `empty` is the conditioning of the empty prompt, one row; unused where `guidance_scale` is 1.
        `sigmas_unshifted` fall from 1: the levels of the evaluations, before the timestep shift.
        """

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1], float32, through the pipeline's autoencoder."""

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        """What a call of the diffusers pipeline is given beside prompt, sigmas and generator to draw as a student has
        learnt to: the pictures' size, no guidance, and what makes it encode the prompt as `encode` does."""

    def save_student(self, transformer: nn.Module, source: Path, folder: Path) -> None:
        """A complete diffusers folder: the student's transformer beside copies of the teacher's other parts."""

    def save_lora(self, weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
        """A LoRA of the transformer as diffusers loads it: the same weights always make the same bytes.

        `weights` are keyed by the transformer's own names, `config` is peft's, in plain JSON values.
        """

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        """Puts what `save_lora` wrote into a pipeline of the teacher. Raises CdmError if it cannot be loaded."""
