"""The blocks of a network compiled by torch: the same forwards in fewer, larger kernels."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from cdm.errors import CdmError
from cdm.training.sharding import blocks_of

VARIANTS = 64
"""Kinds of calls that a block is compiled for: each role, with gradients and without, by sizes of batches."""


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Has each block of `model` compiled when it is first called in a new way; blocks alike share what is compiled.

    Kernels are chosen by rule and not by a race, whose winner may round otherwise the next time: so that a training
    that is taken up again goes on bit by bit. Raises CdmError where the compiler for GPUs is missing.
    """
    if backend == "inductor" and find_spec("triton") is None:
        raise CdmError("runtime.compile needs Triton: pip install triton, or set it to false")
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    for block in blocks_of(model):
        block.compile(backend=backend)
