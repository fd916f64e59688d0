"""From prompts to pictures: text encoders, transformer and autoencoder of the published sizes, random weights."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.clock import Stopwatch
from benchmarks.gpu.scale import Scale, default_dtype
from cdm.families.common import TOKENS

CLIP_TOKENS = 77
PROMPT = "a red three on black paper"


class Tokenizer:
    """Random tokens in place of a vocabulary: as many as asked for, or as the model takes."""

    def __init__(self, words: int, length: int) -> None:
        self.words, self.model_max_length = words, length

    def __call__(self, texts: list[str], *, max_length: int | None = None, **_: Any) -> SimpleNamespace:
        length = max_length or self.model_max_length
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(self.words - 1, (len(texts), length), generator=generator)
        tokens[:, -1] = self.words - 1
        return SimpleNamespace(input_ids=tokens)


def build(scale: Scale, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The whole pipeline, made on the device."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip(config: dict[str, Any]) -> Any:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(**config, eos_token_id=config["vocab_size"] - 1)
        ).eval()

    with scale.torch_device, default_dtype(dtype):
        parts = {
            "text_encoder": clip(scale.clip_l),
            "text_encoder_2": clip(scale.clip_g),
            "text_encoder_3": T5EncoderModel(T5Config(**scale.t5)).eval(),
            "vae": AutoencoderKL(**scale.autoencoder).eval(),
        }
    pipeline = StableDiffusion3Pipeline(
        transformer=scale.transformer(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=Tokenizer(scale.clip_l["vocab_size"], CLIP_TOKENS),
        tokenizer_2=Tokenizer(scale.clip_g["vocab_size"], CLIP_TOKENS),
        tokenizer_3=Tokenizer(scale.t5["vocab_size"], t5_tokens(scale)),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def t5_tokens(scale: Scale) -> int:
    """Text tokens of T5, behind those of CLIP."""
    return scale.architecture.text_shapes[TOKENS][0] - CLIP_TOKENS


def measure(scale: Scale, note: Any) -> None:
    """Seconds a picture of student and teacher, and of each part."""
    device = scale.torch_device
    pipeline = build(scale)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
    note(
        parameters={name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in names},
        resident=torch.cuda.memory_allocated() if device.type == "cuda" else None,
    )

    def draw(steps: int, guidance: float, count: int) -> None:
        pipeline(
            [PROMPT] * count,
            sigmas=[1 - step / steps for step in range(steps)],
            guidance_scale=guidance,
            max_sequence_length=t5_tokens(scale),
            output_type="pt",
        )

    rows: list[dict[str, Any]] = []
    for model, steps, guidance, count in scale.pictures:
        draw(1, guidance, count)
        clock.forget_peak(device)
        whole = clock.seconds_of(lambda: draw(steps, guidance, count), device)  # noqa: B023 - called at once
        peak = clock.peak(device)
        parts = by_part(pipeline, lambda: draw(steps, guidance, count), device)  # noqa: B023 - called at once
        rows.append(
            {
                "model": model,
                "steps": steps,
                "guidance": guidance,
                "pictures": count,
                "seconds": whole / count,
                "parts": {name: seconds / count for name, seconds in parts.items()},
                "peak": peak,
            }
        )
        note(rows=rows)


def by_part(pipeline: Any, draw: Any, device: torch.device) -> dict[str, float]:
    """Seconds of text encoders, transformer, autoencoder and the rest."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        for owner, name, title in (
            (pipeline, "encode_prompt", "text encoders"),
            (pipeline.transformer, "forward", "transformer"),
            (pipeline.vae, "decode", "autoencoder"),
        ):
            stack.enter_context(patch.object(owner, name, watch.around(title, getattr(owner, name))))
        with watch.part("rest"):
            draw()
    return dict(watch.seconds)
