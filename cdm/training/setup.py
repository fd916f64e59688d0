"""Construction of a training: networks on their devices, the training step on its share of the batch, the probe."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cdm.errors import CdmError
from cdm.params import Distill, Params
from cdm.preflight import unsharded
from cdm.training import sharding
from cdm.training.compiling import compile_blocks
from cdm.training.distiller import Distiller
from cdm.training.inputs import Inputs, pair_source, prompt_source
from cdm.training.networks import FullNetworks, LevelAwareFake, LoraNetworks, Networks
from cdm.training.probe import Looks, QualityProbe
from cdm.training.start import InFiles
from cdm.training.state import TrainingState


def prepare(params: Params, inputs: Inputs, accelerator: Accelerator) -> tuple[TrainingState, Distiller]:
    """The networks on their device, and the training step of this process's share of the batch.

    Raises CdmError if the batch does not divide over the processes, or a setting does not work sharded.
    """
    distill, device = params.distill, accelerator.device
    share, rest = divmod(distill.batch_size, accelerator.num_processes)
    if rest:
        raise CdmError(
            f"distill.batch_size {distill.batch_size} does not divide over {accelerator.num_processes} processes"
        )
    networks = build_networks(distill, params.seed, inputs, device, compiled=params.runtime.compile)
    state = TrainingState.start(networks, distill)
    first, micro_batch = accelerator.process_index * share, params.runtime.micro_batch
    samples = range(first, first + share)
    distiller = Distiller(
        state.networks,
        state.student,
        state.fake,
        distill=distill,
        schedule=params.schedule,
        shift=inputs.shift,
        seed=params.seed,
        prompts=prompt_source(inputs, params.seed, distill, samples, device, micro_batch or share),
        empty={name: value.to(device) for name, value in inputs.empty.items()},
        latent_shape=inputs.latent_shape,
        samples=samples,
        pairs=pair_source(inputs, device),
        guide=inputs.family.guide,
        micro_batch=micro_batch,
        device=device,
        most=partial(largest, accelerator=accelerator) if sharding.is_wanted() else int,
    )
    return state, distiller


def build_networks(
    distill: Distill, seed: int, inputs: Inputs, device: torch.device, *, compiled: bool = False
) -> Networks:
    """Teacher, student and fake score, all of them the teacher's weights, on the device or sharded over processes; with
    their blocks `compiled`, or as they are.

    Raises CdmError if a setting does not work sharded.
    """
    if sharding.is_wanted():
        _check_sharded(distill)
    autocast = torch.bfloat16 if distill.precision == "bf16" else None

    def place(
        model: nn.Module, fill: sharding.Fill = sharding.nothing, compute: torch.dtype | None = None
    ) -> nn.Module:
        if compiled and device.type == "cuda":  # elsewhere it takes longer than it saves
            compile_blocks(model)
        if sharding.is_wanted():
            return sharding.shard(model, device, compute, fill)
        fill(model, device)
        return model.to(device)

    family, fake = inputs.family, distill.losses.ask_fake
    teacher = InFiles(family, inputs.source)
    options: dict[str, Any] = {
        "autocast": autocast,
        "gradient_checkpointing": distill.gradient_checkpointing,
        "place": partial(place, compute=autocast),
        "fake": fake,
    }
    networks: Networks = (
        FullNetworks(family, teacher, **options)
        if distill.lora is None
        else LoraNetworks(family, teacher, distill.lora, seed=seed, **options)
    )
    if fake and distill.fake_knows_level:
        return LevelAwareFake(networks, family, inputs.empty, place)
    return networks


def _check_sharded(distill: Distill) -> None:
    problems = list(unsharded(distill))
    if problems:
        raise CdmError("\n".join(problems))


def open_probe(
    params: Params, inputs: Inputs, distiller: Distiller, accelerator: Accelerator
) -> QualityProbe | None:
    """The probe that `distill.probe` asks for; it draws as many samples at once as training does.

    Raises CdmError if it measures pictures and the autoencoder cannot be loaded.
    """
    if inputs.reference is None:
        return None
    settings = params.distill.probe
    return QualityProbe(
        settings,
        inputs.reference,
        distiller.networks,
        Looks(inputs.family, inputs.source, settings.metrics, accelerator.device) if settings.metrics else None,
        seed=params.seed,
        shift=inputs.shift,
        latent_shape=inputs.latent_shape,
        batch=len(distiller.parts[0]),
        accelerator=accelerator,
    )


def largest(value: int, accelerator: Accelerator) -> int:
    """The largest of a number over the processes."""
    if accelerator.num_processes == 1:
        return value
    most = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
