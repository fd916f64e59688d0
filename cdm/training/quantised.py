"""Frozen weights in 8 or 4 bits, by bitsandbytes: for a LoRA of a teacher that is too large for a card otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm.training.sharding import blocks_of

EIGHT, FOUR = 256, 64
"""Numbers that share a scale, in 8 and in 4 bits."""
SCALES = 256
"""Scales of 4 bits that share one of their own: each of them is a byte."""
BYTES, NIBBLES = 4 * 256, 4 * 16
"""Size of the tables of the values that 8 and 4 bits stand for, which every layer keeps."""


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
    count = shape[0] * shape[1]
    if base == "8bit":
        return count + 4 * -(-count // EIGHT) + BYTES
    if base == "4bit":
        scales = -(-count // FOUR)
        return -(-count // 2) + scales + 4 * -(-scales // SCALES) + BYTES + NIBBLES
    return number * count


def quantise(model: nn.Module, base: str, place: Callable[[nn.Module, str], nn.Module]) -> None:
    """Keeps the linear layers of the blocks of a frozen model on a `distill.lora.base`, each rounded in its `place`, so
    that the model is never whole there. `place` is told a layer's name in the model."""
    if base == "precision":
        return
    names = {module: name for name, module in model.named_modules()}
    for parent, name, layer in list(quantised_layers(model)):
        setattr(parent, name, RoundedLinear(place(layer, names.pop(layer)), base))


class RoundedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in 8 bits (arXiv 2110.02861) or 4 (NF4, arXiv 2305.14314).

    Its products are those of the rounded weight in the type of the arithmetic. The weight is made whole for each
    product and let go: the graph holds neither it nor the input. Of bitsandbytes only the rounding is taken: its own
    layers round activations too and keep them past gradient checkpointing (8 bits), or repack weights for inference
    (4 bits, on CPUs).
    """

    def __init__(self, layer: nn.Module, base: str) -> None:
        from bitsandbytes import functional

        assert isinstance(layer, nn.Linear)
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        whole = layer.weight.data.contiguous()
        codes, self.rounding = (
            functional.quantize_blockwise(whole, blocksize=EIGHT)
            if base == "8bit"
            else functional.quantize_4bit(whole, blocksize=FOUR, compress_statistics=True, quant_type="nf4")
        )
        self.restore: Any = functional.dequantize_blockwise if base == "8bit" else functional.dequantize_4bit
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight, (rows, columns)."""
        weight: Tensor = self.restore(self.weight, self.rounding)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        product: Tensor = _Product.apply(x.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)  # type: ignore[redundant-expr]


class _Product(torch.autograd.Function):
    """`x @ weight.T` of a `RoundedLinear`, with derivatives in `x` alone."""

    @staticmethod
    def forward(x: Tensor, layer: RoundedLinear) -> Tensor:
        return F.linear(x, layer.whole(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, RoundedLinear], output: Tensor) -> None:
        del output
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.whole(gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return F.linear(tangent, ctx.layer.whole(tangent.dtype))
