"""The form of a safetensors file: its header, and where each tensor lies behind it.

For writers that have not all tensors of a file at once, which the library of that name wants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Types as the form names them; a file has them in this order, from behind."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def layout(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The head of a file of `tensors`, of which only types and shapes are read, as the library would write it; and
    where each begins behind it, in the order in which they lie."""
    order = list(NAMES)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a file; its own memory where that is main memory without gaps."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
