"""How large everything is: SD3-Medium as published, with many or few repetitions, or a rehearsal on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import ROOT
from cdm.families import get_family
from cdm.families.common import KL_AUTOENCODER, POOLED, TOKENS
from cdm.families.configs import TRANSFORMER
from cdm.params import Params, load, parse
from cdm.planning.architecture import Architecture, published

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class Scale:
    """Sizes and repetitions of all parts."""

    name: str
    device: str
    architecture: Architecture
    batch: int
    """Samples of an iteration of a LoRA, all in one forward and backward."""
    full_batch: int
    """The same where all weights learn: there are 37 GB of weights and states beside the graphs."""
    max_len: int
    """Longest schedule; the recipes have 28."""
    rank: int
    rounds: int
    """Rounds of each order that are timed."""
    repeats: int
    """Repetitions of a single forward or update."""
    micro_batches: tuple[int, ...]
    compile_batch: int
    compile_backend: str
    matrix: int
    """Rows of the square matrices of the machine's own rate."""
    clip_l: dict[str, Any]
    clip_g: dict[str, Any]
    t5: dict[str, Any]
    autoencoder_channels: tuple[int, ...]
    autoencoder_groups: int
    pictures: tuple[tuple[str, int, float, int], ...]
    """What is sampled: (model, steps, guidance, pictures at once)."""
    miniature: dict[str, dict[str, Any]]
    """Parameters of the miniature that are changed, by section."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def transformer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The transformer with random weights, made on the device."""
        with self.torch_device, default_dtype(dtype):
            return self.architecture.build().eval()

    @property
    def autoencoder(self) -> dict[str, Any]:
        """The config of the autoencoder, which is SD3's but for its channels."""
        count = len(self.autoencoder_channels)
        config = KL_AUTOENCODER | {
            "down_block_types": ("DownEncoderBlock2D",) * count,
            "up_block_types": ("UpDecoderBlock2D",) * count,
            "block_out_channels": self.autoencoder_channels,
            "norm_num_groups": self.autoencoder_groups,
            "sample_size": 1024,
        }
        del config["_class_name"]  # it is no argument of the class
        return config

    def conditioning(self, rows: int) -> dict[str, Tensor]:
        """Random embeddings of `rows` prompts."""
        generator = torch.Generator(self.device).manual_seed(0)
        return {
            name: torch.randn(rows, *shape, generator=generator, device=self.device)
            for name, shape in self.architecture.text_shapes.items()
        }

    def params(self, recipe: str, states: str = "fp32") -> Params:
        """A recipe's parameters, at this scale's batch, in one process."""
        values = load(ROOT / "recipes" / f"{recipe}.yaml").model_dump()
        values["schedule"]["max_len"] = self.max_len
        values["distill"]["batch_size"] = self.batch if values["distill"]["lora"] else self.full_batch
        values["distill"]["fake_knows_level"] = False  # a small map that takes no time
        for role in ("student", "fake"):
            values["distill"][role]["states"] = states
        if values["distill"]["lora"]:
            values["distill"]["lora"] = {"rank": self.rank, "alpha": 2 * self.rank}
        values["runtime"] |= {"device": self.device, "micro_batch": None, "accelerate_config": None}
        return parse(values)


class default_dtype:  # noqa: N801 - a context manager in the manner of torch.device
    """Has new tensors made in a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


DEFAULT = Scale(
    name="default",
    device="cuda",
    architecture=published(get_family("sd3"), "stabilityai/stable-diffusion-3-medium-diffusers"),
    batch=16,
    full_batch=8,
    max_len=28,
    rank=64,
    rounds=1,
    repeats=2,
    micro_batches=(1, 4, 16),
    compile_batch=8,
    compile_backend="inductor",
    matrix=8192,
    clip_l=CLIP_L,
    clip_g=CLIP_G,
    t5=T5_XXL,
    autoencoder_channels=(128, 256, 512, 512),
    autoencoder_groups=32,
    pictures=(
        ("student", 4, 1.0, 1),
        ("teacher", 28, 4.5, 1),
        ("teacher", 50, 4.5, 1),
        ("student", 4, 1.0, 4),
        ("teacher", 50, 4.5, 4),
    ),
    miniature={
        "runtime": {"device": "cuda", "batch_size": 1024, "pictures_every": 0},
        # half of the recipe's iterations, so that there is time to measure the student
        "distill": {"iterations": 1200, "precision": "bf16"},
    },
)
QUICK = replace(
    DEFAULT,
    name="quick",
    batch=4,
    full_batch=4,
    max_len=8,
    repeats=1,
    micro_batches=(1, 4),
    compile_batch=2,
    pictures=(("student", 4, 1.0, 1), ("teacher", 8, 4.5, 1)),
    miniature={
        "runtime": {"device": "cuda", "batch_size": 1024, "pictures_every": 0},
        "latents": {"steps": 8, "per_prompt": 4},
        "distill": {"iterations": 60, "fake_only": 12, "precision": "bf16"},
        "sample": {"steps": [1, 4], "teacher_steps": [4]},
    },
)
_TINY_CONFIG = {
    "sample_size": 8,
    "in_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 8,
}
_TINY_CLIP = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TINY = replace(
    QUICK,
    name="tiny",
    device="cpu",
    architecture=Architecture(
        name="tiny",
        family=get_family("sd3"),
        configs={TRANSFORMER: _TINY_CONFIG},
        latent_shape=(16, 8, 8),
        text_shapes={TOKENS: (93, 64), POOLED: (64,)},
        shift=3.0,
        encoder_parameters=0,
    ),
    batch=2,
    full_batch=2,
    max_len=3,
    rank=4,
    micro_batches=(1, 2),
    compile_backend="eager",
    matrix=64,
    clip_l=_TINY_CLIP,
    clip_g=_TINY_CLIP,
    t5={"vocab_size": 128, "d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    autoencoder_channels=(8, 8, 8, 8),
    autoencoder_groups=4,
    pictures=(("student", 2, 1.0, 1), ("teacher", 3, 4.5, 2)),
    miniature={
        "runtime": {"device": "cpu"},
        "latents": {"steps": 2, "per_prompt": 4},
        "prompts": {"eval_count": 4},
        "distill": {"iterations": 6, "fake_only": 3, "batch_size": 4, "precision": "bf16"},
        "sample": {"steps": [1, 2], "teacher_steps": [1], "pictures": 2},
    },
)
SCALES = {scale.name: scale for scale in (DEFAULT, QUICK, TINY)}
