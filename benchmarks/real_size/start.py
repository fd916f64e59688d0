"""The start of a training alone: `python -m benchmarks.real_size.start FOLDER PARAMS.yaml OUT.json`.

Networks, optimisers and the moving average are made as the stage `distill` makes them, in one process or, by the
launcher's variables, in one of several that share them. OUT has the bytes before, of what is held, and after.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed

from benchmarks.real_size import memory
from cdm.families import get_family
from cdm.params import load
from cdm.training import sharding
from cdm.training.setup import build_networks
from cdm.training.state import TrainingState


def main(folder: Path, params_file: Path, out: Path) -> None:
    params = load(params_file)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    family: Any = get_family("sd3")
    family.count_parameters(folder)  # loads the libraries
    before = memory.now()
    width = 2048
    inputs: Any = SimpleNamespace(
        family=family, source=folder, empty={"pooled_projections": torch.zeros(1, width), "encoder_hidden_states": torch.zeros(1, 333, 4096)}
    )
    networks = build_networks(params.distill, 0, inputs, torch.device("cpu"))
    built = memory.now()
    state = TrainingState.start(networks, params.distill)
    models: Any = getattr(networks, "networks", networks)
    models = list(models.models.values()) if hasattr(models, "models") else [models.model]
    held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    held += state.average.values()
    here = sum(sharding.slice_of(tensor.detach()).nbytes for tensor in held)
    everywhere = sum(tensor.numel() * tensor.element_size() for tensor in held)
    blocks = [list(block.parameters()) for model in models for block in sharding.blocks_of(model)]
    largest = max(sum(value.numel() * value.element_size() for value in block) for block in blocks)
    values = {
        "before": before,
        "built": built,
        "after": memory.now(),
        "held": here,
        "weights": everywhere,
        "block": largest,
    }
    out.write_text(json.dumps(values))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
