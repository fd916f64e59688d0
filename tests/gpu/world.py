"""A training of the miniature on a device, without its prompts: their embeddings are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdm.families import get_family
from cdm.params import Params, load, parse
from cdm.training.compiling import compile_blocks
from cdm.training.distiller import Distiller
from cdm.training.networks import FullNetworks, LoraNetworks, Networks, Place
from cdm.training.sharding import Fill, nothing, whole_of
from cdm.training.state import TrainingState

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "miniature/teacher"
BATCH = 6
CASES: dict[str, dict[str, Any]] = {
    "full, fp32": {},
    "full, bf16, gradient checkpointing": {"precision": "bf16", "gradient_checkpointing": True},
    "LoRA, bf16, gradient checkpointing": {
        "precision": "bf16",
        "gradient_checkpointing": True,
        "lora": {"rank": 8, "alpha": 16.0},
    },
}


def settings(compiled: bool = False, **changes: Any) -> Params:
    """The miniature's parameters with updates that are as well conditioned as the gradients: AdamW's eps is large."""
    values = load(ROOT / "params.yaml").model_dump()
    optimiser = {"lr": 0.01, "warmup": 0, "eps": 1.0}
    values["distill"] |= {"batch_size": BATCH, "fake_only": 0, "fake_knows_level": False}
    values["distill"] |= {"student": optimiser, "fake": optimiser, **changes}
    values["runtime"]["compile"] = compiled
    return parse(values)


def build(params: Params, device: torch.device, place: Place | None = None) -> tuple[TrainingState, Distiller]:
    """A training at its start; `place` puts the networks elsewhere than whole on the device."""
    distill, family = params.distill, get_family("sd3")

    def put(model: nn.Module, fill: Fill = nothing) -> nn.Module:
        if params.runtime.compile:
            compile_blocks(model)
        fill(model, device)
        return model.to(device)

    options: dict[str, Any] = {
        "autocast": torch.bfloat16 if distill.precision == "bf16" else None,
        "gradient_checkpointing": distill.gradient_checkpointing,
        "place": place or put,
    }
    teacher = family.load_transformer(TEACHER)
    width: int = teacher.config.joint_attention_dim
    pooled: int = teacher.config.pooled_projection_dim
    networks: Networks = (
        FullNetworks(family, teacher, **options)
        if distill.lora is None
        else LoraNetworks(family, teacher, distill.lora, seed=0, **options)
    )
    state = TrainingState.start(networks, distill)

    def prompts(rows: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(rows, 8, width, generator=generator)
        vector = torch.randn(rows, pooled, generator=generator)
        return {"encoder_hidden_states": tokens.to(device), "pooled_projections": vector.to(device)}

    batch = prompts(BATCH, 1)
    distiller = Distiller(
        networks,
        state.student,
        state.fake,
        distill=distill,
        schedule=params.schedule,
        shift=family.shift(TEACHER),
        seed=0,
        prompts=lambda _, samples: {name: value[list(samples)] for name, value in batch.items()},
        empty=prompts(1, 2),
        latent_shape=family.latent_shape(TEACHER),
        samples=range(BATCH),
        device=device,
    )
    return state, distiller


def go_on(state: TrainingState, distiller: Distiller, rounds: int) -> dict[str, float]:
    """Some rounds from where the training is; the metrics of the last."""
    metrics: dict[str, float] = {}
    for _ in range(rounds):
        metrics = distiller.round(state.iteration)
        state.after_round(metrics, state.iteration, distiller.distill)
    return metrics


def weights(state: TrainingState) -> dict[str, Tensor]:
    """A copy of the student's weights, on the CPU."""
    return {name: whole_of(value.detach()).cpu().clone() for name, value in state.student.parameters.items()}


def change(state: TrainingState, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far the student has moved, on the CPU."""
    return {name: value - before[name] for name, value in weights(state).items()}


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The norm of the difference, relative to that of the others."""
    flat, other = (torch.cat([each[name].flatten() for name in others]) for each in (some, others))
    return float((flat - other).norm() / other.norm())
