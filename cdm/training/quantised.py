"""Frozen weights in 8 or 4 bits, by bitsandbytes: for a LoRA of a teacher that is too large for a card otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from cdm.training.sharding import blocks_of

GROUP = 64
"""Numbers that share a scale in 4 bits."""
SCALES = 256
"""Such scales that share one of their own: each of them is a byte."""


def quantised_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that are kept in fewer bits, each with the module that has it and its name there: those of the
    blocks. What is outside (embedders, the last layer) is small, and sensitive."""
    for blocks in blocks_of(model):
        for parent in blocks.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


def quantised_bytes(shape: tuple[int, int], base: str, number: int) -> int:
    """Bytes of a layer's weight (rows, columns) on a `distill.lora.base`; `number` is those of a number in the type of
    the arithmetic."""
    rows, columns = shape
    if base == "8bit":
        return rows * columns + 4 * rows  # a float32 scale for each row
    if base == "4bit":
        groups = -(-rows * columns // GROUP)
        return -(-rows * columns // 2) + groups + 4 * -(-groups // SCALES)
    return number * rows * columns


def quantise(model: nn.Module, base: str, place: Callable[[nn.Module], nn.Module]) -> None:
    """Keeps the linear layers of the blocks of a frozen model on a `distill.lora.base`, each put in its `place` first.

    8bit is LLM.int8 (arXiv 2208.07339), 4bit the NF4 of QLoRA (arXiv 2305.14314) with its scales in a byte each.
    Products are in the type that the weights had; gradients pass through.
    """
    if base == "precision":
        return
    for parent, name, layer in list(quantised_layers(model)):
        small = place(_eight_bit(layer) if base == "8bit" else _four_bit(layer))
        setattr(parent, name, small.to(small.weight.device))  # which rounds them, where the place has not


def _eight_bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        small = Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    small.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    small.bias = layer.bias
    return small


def _four_bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    small.weight = Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
    )
    small.bias = layer.bias
    return small
