"""A file of tensors in the form of safetensors, written tensor by tensor and hashed meanwhile.

The library of that name wants all tensors of a file in main memory before it writes the first one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""Types as the format names them."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
SLICES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where `torch.distributed.checkpoint` keeps, in the header of such a file, where each slice begins in its tensor."""
PIECE = 2**24
"""Bytes that are hashed and written at once."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] = {}) -> str:
    """Writes `tensors`, from any device, and puts them on the disk; returns the SHA-256 of the file.

    One tensor at a time is copied to main memory, unless it is there. `offsets` are given where these are slices of
    larger tensors: the index at which each begins. Raises OSError.
    """
    # As the library orders them: by the size of their numbers, so that each lies at a multiple of it.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    if offsets:
        slices = {name: {OFFSETS: list(offsets[name])} for name in order}
        header["__metadata__"] = {SLICES: json.dumps(slices)}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            digest.update(head)
            file.write(head)
        for name in order:
            content = _bytes_of(tensors[name])
            for begin in range(0, len(content), PIECE):
                piece = content[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor; its own memory where that is main memory without gaps."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, torch.Size]]:
    """Type, shape and offset of each tensor or slice in a file. Raises OSError, and ValueError for another file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    slices = json.loads(header.pop("__metadata__", {}).get(SLICES, "{}"))
    found = {}
    for name, entry in header.items():
        shape = torch.Size(entry["shape"])
        begin = torch.Size(slices[name][OFFSETS] if name in slices else [0] * len(shape))
        found[name] = (DTYPES[entry["dtype"]], shape, begin)
    return found
