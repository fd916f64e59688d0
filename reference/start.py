"""The start of a training alone, or with rounds: `python -m reference.start PARAMS.json OUT.json ROUNDS`.

Networks, optimisers and the moving average are made as the stage `distill` makes them, in one process or, by the
launcher's variables, in one of several that share them. OUT has the anonymous bytes before and after, and the bytes of
what is held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from cdm.params import load
from cdm.planning.architecture import find
from cdm.training import sharding
from cdm.training.state import TrainingState
from reference import watched
from reference.memory import rounds


def main(params_file: Path, out: Path, count: int) -> None:
    params = load(params_file)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    architecture = find(params.teacher, params.prompts.max_sequence_length)
    architecture.family.count_parameters(architecture.configs)  # loads the libraries
    before = watched.now()

    def started(state: TrainingState) -> None:
        out.write_text(json.dumps({"before": before, "after": watched.now(), **held(state)}))

    rounds(params, architecture, count, started)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def held(state: TrainingState) -> dict[str, int]:
    """Bytes of the networks and the moving average: `here`, of all processes together, and of the largest block."""
    networks: Any = getattr(state.networks, "networks", state.networks)  # of a level-aware fake score
    models = list(networks.models.values()) if hasattr(networks, "models") else [networks.model]
    tensors = [tensor.detach() for model in models for tensor in (*model.parameters(), *model.buffers())]
    tensors += state.average.values()
    blocks = [block for model in models for block in sharding.blocks_of(model)]
    return {
        "here": sum(sharding.slice_of(tensor).nbytes for tensor in tensors),
        "everywhere": sum(map(whole_bytes, tensors)),
        "block": max(sum(map(whole_bytes, block.parameters())) for block in blocks),
    }


def whole_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, of which a slice may be here."""
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
