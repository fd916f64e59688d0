"""Stable Diffusion 3: an MMDiT on square latents; two CLIP text encoders and, where the folder has one, T5."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.base import Conditioning
from cdm.progress import quieten_libraries

TEXT_COMPONENTS = [f"{kind}{suffix}" for suffix in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer")]


class StableDiffusion3:
    name = "sd3"
    pipeline_class_name = "StableDiffusion3Pipeline"
    lora_targets: ClassVar = [
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]

    def load_pipeline(
        self,
        source: Path,
        *,
        text: bool = True,
        image: bool = True,
        transformer: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        from diffusers import StableDiffusion3Pipeline

        index = _config(source, "model_index.json")
        left_out = [name for name in TEXT_COMPONENTS if not text or not (index.get(name) or [None])[0]]
        if not image:
            left_out.append("vae")
        if not transformer and "text_encoder_3" not in left_out:  # else its width is that of T5's stand-in
            left_out.append("transformer")
        pipeline = _load(StableDiffusion3Pipeline, source, dtype, **dict.fromkeys(left_out))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def load_transformer(self, source: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        transformer: nn.Module = _load(SD3Transformer2DModel, source, dtype, subfolder="transformer")
        return transformer.eval()

    def latent_shape(self, source: Path) -> tuple[int, ...]:
        config = _config(source, "transformer/config.json")
        return config["in_channels"], config["sample_size"], config["sample_size"]

    def shift(self, source: Path) -> float:
        config = _config(source, "scheduler/scheduler_config.json")
        if config.get("use_dynamic_shifting"):
            raise CdmError(f"{source}: its scheduler shifts dynamically, which the family sd3 does not know")
        return float(config.get("shift", 1.0))

    def encode(self, pipeline: Any, prompts: list[str], max_sequence_length: int | None = None) -> Conditioning:
        if max_sequence_length is None:  # the pipeline's default, or none of the zeros that stand in for T5
            max_sequence_length = 256 if pipeline.text_encoder_3 else 0
        if pipeline.text_encoder_3 and max_sequence_length == 0:
            raise CdmError("max_sequence_length is 0, but the model has a T5 encoder: give it up to 512 tokens")
        with torch.no_grad():
            text, _, pooled, _ = pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = transformer(x, timestep=1000 * sigma, return_dict=False, **conditioning)[0]
        return velocity

    def embedding_width(self, conditioning: Conditioning) -> int:
        return conditioning["pooled_projections"].shape[-1]

    def add_embedding(self, conditioning: Conditioning, embedding: Tensor) -> Conditioning:
        return conditioning | {"pooled_projections": conditioning["pooled_projections"] + embedding}

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
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
        negative = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in empty.items()}
        latents: Tensor = pipeline(
            prompt_embeds=conditioning["encoder_hidden_states"],
            pooled_prompt_embeds=conditioning["pooled_projections"],
            negative_prompt_embeds=negative["encoder_hidden_states"],
            negative_pooled_prompt_embeds=negative["pooled_projections"],
            latents=noise,
            sigmas=sigmas_unshifted,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
        return latents

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_student(self, transformer: nn.Module, source: Path, folder: Path) -> None:
        shutil.rmtree(folder / "transformer", ignore_errors=True)
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", ".*"))
        save: Any = transformer.save_pretrained  # of every diffusers model
        save(folder / "transformer")

    def save_lora(self, weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
        from safetensors.torch import save_file

        # By diffusers' own writer the file would differ from run to run: it has two entries, in random order.
        prefixed = {
            f"{StableDiffusion3Pipeline.transformer_name}.{key}": value for key, value in config.items()
        }
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(prefixed, sort_keys=True)}
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, save_function=partial(save_file, metadata=metadata)
        )

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        try:
            pipeline.load_lora_weights(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CdmError(f"{folder}: cannot be loaded as a LoRA: {' '.join(str(error).split())}") from None


def _config(source: Path, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CdmError(f"{source / name}: not a readable config of a diffusers folder ({error})") from None
    return config


def _load(model: Any, source: Path, dtype: torch.dtype, **options: Any) -> Any:
    quieten_libraries()
    try:
        return model.from_pretrained(
            source, dtype=dtype, use_safetensors=True, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CdmError(
            f"{source}: cannot be loaded as {model.__name__}: {' '.join(str(error).split())}"
        ) from None
