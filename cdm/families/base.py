"""The interface of a family: loading, text encoding, velocity, sampling and saving for one architecture.

The rest of `cdm` uses models through it alone and never asks which architecture it holds. A family is a subclass of
`Family` in a module of its own. The base class serves a pipeline of diffusers; a subclass names its parts, says how
prompts are encoded and what the transformer takes and returns, and replaces a method where its pipeline does otherwise.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.common import (
    PATCH,
    POOLED,
    TOKENS,
    Conditioning,
    dynamic_shift,
    load,
    loading,
    set_scheduler,
    to_unit_range,
    token_limit,
)
from cdm.families.configs import AUTOENCODER, SCHEDULER, TRANSFORMER, Configs, read_config
from cdm.families.folder import copy_parts
from cdm.families.folder import weights as weight_files
from cdm.families.weights import MappedWeights, constants, fill, fill_constants, write
from cdm.system.progress import quieten_libraries


def expand_to_batch(row: Conditioning, batch: int) -> Conditioning:
    """The conditioning of one prompt, (1, ...), for each of `batch` samples, (batch, ...); nothing is copied."""
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in row.items()}


@dataclass(frozen=True)
class Published:
    """A model on a hub, as far as `cdm plan` must know it where no file of it is on this disk."""

    configs: Mapping[str, Mapping[str, Any]]
    """What its configs say of its size and of its timestep shift, by their paths in its folder."""
    encoder_parameters: int
    """Parameters of all its text encoders."""


class PromptEmbedding(Protocol):
    """The part of a family that adds to the embedding of a prompt, such as the level at which the student made its
    data."""

    def embedding_width(self, conditioning: Conditioning) -> int:
        """Width of the vector that stands for a whole prompt, as `add_embedding` takes it."""
        ...

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        """The conditioning with `embedding` (batch, width) added to the vector that stands for a whole prompt."""
        ...


class Family(PromptEmbedding, ABC):
    """One architecture. Sigmas follow `cdm.flow`: 1 is noise, 0 is data.

    Latents are (batch, channels, height, width) everywhere; a family whose transformer takes them otherwise packs
    and unpacks in `velocity`. `source` and `folder` are diffusers folders on this disk; where configs are enough,
    those of a `Published` model do as well. `resolution` is the pictures' height and width in pixels; None is what
    the family draws by default. `max_sequence_length` counts text tokens.
    """

    name: ClassVar[str]
    """As in `teacher.family`: the name of the family's module."""
    pipeline_class_name: ClassVar[str]
    """The diffusers pipeline that draws with it."""
    transformer_class_name: ClassVar[str]
    """The diffusers model that predicts the velocity."""
    text_components: ClassVar[list[str]]
    """Parts of the pipeline that only encode prompts."""
    optional_components: ClassVar[list[str]] = []
    """Those of them that a pipeline need not have: text encoders with their tokenizers."""
    chat_template: ClassVar[bool] = False
    """Whether the pipeline writes prompts in the tokenizer's chat template."""
    attention_layers: ClassVar[list[str]]
    """Ends of the names of the linear layers of attention, which LoRA can adapt; * stands for anything."""
    feed_forward_layers: ClassVar[list[str]]
    """The same, of the feed-forward layers."""
    original_layers: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Those linear layers by their names in the files of the model's authors, which ComfyUI goes by: for each the
    layers of diffusers of which it is made, one below the other. {} is the number of a block."""
    resolution: ClassVar[int] = 1024
    """Default height and width of a picture, in pixels."""
    default_tokens: ClassVar[int] = 512
    """Default number of text tokens of a prompt: that of the pipeline."""
    most_tokens: ClassVar[int] = 512
    """The most text tokens that the pipeline takes."""
    published: ClassVar[Mapping[str, Published]] = {}
    """Models that can be planned by their hub id alone."""

    # From the configs alone: sizes, the timestep shift, and the transformer without weights.

    def latent_channels(self, source: Configs) -> int:
        """Channels of the latents: here, of the autoencoder."""
        return int(read_config(source, AUTOENCODER)["latent_channels"])

    def pixels_per_latent(self, source: Configs) -> int:
        """Pixels on a side of one latent."""
        return 2 ** (len(read_config(source, AUTOENCODER)["block_out_channels"]) - 1)

    def latent_shape(self, source: Configs, resolution: int | None = None) -> tuple[int, ...]:
        """Shape of one sample's latents, (channels, height, width).

        Raises CdmError if the model does not draw at `resolution`.
        """
        resolution = resolution or self.resolution
        pixels = self.pixels_per_latent(source)
        if resolution % (pixels * PATCH):
            nearest = max(round(resolution / (pixels * PATCH)), 1) * pixels * PATCH
            raise CdmError(
                f"teacher.resolution is {resolution}, but this model draws multiples of {pixels * PATCH} pixels:"
                f" use {nearest}"
            )
        return self.latent_channels(source), resolution // pixels, resolution // pixels

    def shift(self, source: Configs, resolution: int | None = None) -> float:
        """The timestep shift of the teacher's scheduler (`cdm.flow.shift_sigmas`)."""
        scheduler = read_config(source, SCHEDULER)
        if not scheduler.get("use_dynamic_shifting"):
            return float(scheduler.get("shift", 1.0))
        mu = dynamic_shift(scheduler, self.latent_shape(source, resolution))
        return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)

    @abstractmethod
    def conditioning_shapes(
        self, source: Configs, max_sequence_length: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that `encode` makes of one prompt, without the batch, by its name there.

        Raises CdmError if the model does not take texts of that length.
        """

    def build_transformer(self, source: Configs) -> nn.Module:
        """The transformer of its config, on the device of the context, its weights not loaded.

        Under `torch.device("meta")` it takes no memory, however large it is.
        """
        import diffusers

        quieten_libraries()
        transformer: nn.Module = getattr(diffusers, self.transformer_class_name).from_config(
            read_config(source, TRANSFORMER)
        )
        return transformer.eval()

    def count_parameters(self, source: Configs) -> int:
        """Number of the transformer's parameters, without the constants stored beside them, such as positions."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build_transformer(source).parameters())

    def adapted_layers(self, transformer: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """The linear layers of the transformer that `distill.lora.targets` means: ends of names, as peft takes them, or
        where * stands in one the whole names. Raises CdmError for an end that no layer has."""
        sets = {
            "attention": self.attention_layers,
            "attention+feed-forward": [*self.attention_layers, *self.feed_forward_layers],
        }
        names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        found: list[str] = []
        for end in sets[targets] if isinstance(targets, str) else targets:
            those = [name for name in names if fnmatchcase(f".{name}", f"*.{end}")]
            if not those and not isinstance(targets, str):
                raise CdmError(
                    f"distill.lora.targets: no linear layer of {type(transformer).__name__} has a name that ends in"
                    f" {end}: take such as {names[len(names) // 2]}"
                )
            found += those if "*" in end else [end]
        return found

    # Loading and saving.

    def left_out(self, source: Path, *, text: bool, image: bool, transformer: bool) -> list[str]:
        """Parts of the pipeline that `load_pipeline` does not load with these arguments."""
        del source
        parts = [] if text else list(self.text_components)
        return parts + ([] if image else ["vae"]) + ([] if transformer else ["transformer"])

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
        left_out = self.left_out(source, text=text, image=image, transformer=transformer)
        pipeline = load(self.pipeline_class_name, source, dtype, **dict.fromkeys(left_out))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def mapped_weights(self, source: Path) -> MappedWeights:
        """The transformer's weights in their files, by the names of its parameters. Raises CdmError if they cannot be
        read."""
        with torch.device("meta"):
            model: Any = self.build_transformer(source)
        names = weight_files(source, "transformer", "diffusers")
        rename = model._fix_state_dict_keys_on_load  # noqa: SLF001 - names that its loader knows, too
        return MappedWeights([source / "transformer" / name for name in names], rename)

    def empty_transformer(self, source: Path, dtype: torch.dtype | None = None) -> nn.Module:
        """The transformer that is to be filled with weights, in evaluation mode: its parameters are on the meta device,
        its constants on the CPU, stored ones as in its files.

        `dtype` None is float32. Raises CdmError if it cannot be built.
        """
        from accelerate import init_empty_weights

        with loading(self.transformer_class_name, source):
            stored = self.mapped_weights(source)
            with torch.device("meta"):
                transformer = self.build_transformer(source)
            if not set(constants(transformer)) <= stored.keys():
                # Some are to be computed: in float32, whatever type is asked for, and rounded then.
                with init_empty_weights(include_buffers=False):
                    transformer = self.build_transformer(source)
            fill_constants(transformer, stored)
            known: Any = transformer
            known.register_to_config(_name_or_path=str(source))
        return transformer.to(dtype or torch.float32)

    def load_transformer(self, source: Path, dtype: torch.dtype | None = None) -> nn.Module:
        """The transformer alone, on the CPU, in evaluation mode; `dtype` None is float32, and nothing is ever in
        another type than the files' and this. Raises CdmError if it cannot be loaded."""
        transformer = self.empty_transformer(source, dtype)
        with loading(self.transformer_class_name, source):
            fill(transformer, self.mapped_weights(source), torch.device("cpu"))
        return transformer

    def save_student(
        self,
        transformer: nn.Module,
        source: Path,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """A complete diffusers folder: the student's transformer beside copies of the teacher's other parts.

        `weights` are its parameters, asked for one after the other, if it has none itself (`empty_transformer`).
        """
        copy_parts(source, folder, without="transformer")
        model: Any = transformer  # of diffusers
        model.save_config(folder / "transformer")
        tensors: dict[str, Tensor] = transformer.state_dict()
        held = ((name, tensor) for name, tensor in tensors.items() if not tensor.is_meta)
        write(folder / "transformer", tensors, chain(held, weights or ()))
        scheduler = read_config(folder, SCHEDULER)
        if scheduler.get("shift_terminal") is not None:  # see `set_scheduler`
            (folder / SCHEDULER).write_text(json.dumps(scheduler | {"shift_terminal": None}, indent=2) + "\n")

    def save_lora(self, weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
        """A LoRA of the transformer as diffusers loads it: the same weights always make the same bytes.

        `weights` are keyed by the transformer's own names, `config` is peft's, in plain JSON values.
        """
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
        from safetensors.torch import save_file

        # Not by diffusers' own writer: it puts two entries in random order, so that files differ from run to run.
        metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"transformer.{name}": value.contiguous() for name, value in weights.items()},
            folder / LORA_WEIGHT_NAME_SAFE,
            metadata={LORA_ADAPTER_METADATA_KEY: metadata},
        )

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        """Puts what `save_lora` wrote into a pipeline of the teacher. Raises CdmError if it cannot be loaded."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        # Not by the pipeline's loader: some have none, and the others miss the text encoders where they are not loaded.
        load_adapter = pipeline.transformer.load_lora_adapter
        try:
            load_adapter(folder, weight_name=LORA_WEIGHT_NAME_SAFE, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CdmError(f"{folder}: cannot be loaded as a LoRA: {' '.join(str(error).split())}") from None

    # Conditioning.

    def text_tokens(self, max_sequence_length: int | None) -> int:
        """Text tokens of a prompt; raises CdmError if the model does not take so many."""
        return token_limit(max_sequence_length, self.default_tokens, self.most_tokens)

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        """The conditioning on the prompts, as `velocity` takes it.

        Raises CdmError if the model does not take texts of that length.
        """

    def embedding_width(self, conditioning: Conditioning) -> int:
        # Where no vector stands for the whole prompt, all its tokens do.
        return conditioning.get(POOLED, conditioning[TOKENS]).shape[-1]

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        if POOLED in conditioning:
            return conditioning | {POOLED: conditioning[POOLED] + embedding}
        return conditioning | {TOKENS: conditioning[TOKENS] + embedding[:, None]}

    # Sampling.

    @abstractmethod
    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted velocity, `noise - x0`, of `x` (batch, channels, height, width) at levels `sigma` (batch,).

        Runs on the meta device and on fake tensors too, as long as the conditioning has no mask: nothing may depend
        on a tensor's numbers.
        """

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance on velocities, as the teacher's pipeline does it; `scale` 1 is none."""
        return uncond + scale * (cond - uncond)

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
        scheduler = set_scheduler(pipeline.scheduler, noise.shape[1:], sigmas_unshifted, noise.device)
        negative = expand_to_batch(empty, len(noise))
        x = noise
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                sigma = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
                velocity = self.velocity(pipeline.transformer, x, sigma, conditioning)
                if guidance_scale != 1:
                    uncond = self.velocity(pipeline.transformer, x, sigma, negative)
                    velocity = self.guide(velocity, uncond, guidance_scale)
                x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    def call_options(
        self, source: Path, latent_shape: tuple[int, ...], max_sequence_length: int | None
    ) -> dict[str, Any]:
        """Arguments of a call of the diffusers pipeline, beside prompt, sigmas and generator, for sampling with a
        student: the pictures' size, no guidance, and what makes it encode the prompt as `encode` does."""
        height, width = (size * self.pixels_per_latent(source) for size in latent_shape[-2:])
        return {"height": height, "width": width, "guidance_scale": 1.0}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1], float32, through the pipeline's autoencoder."""
        vae = pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return to_unit_range(images)
