"""A file of tensors in the form of safetensors, written tensor by tensor and hashed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cdm.families.tensor_form import DTYPES, content, layout

SLICES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where `torch.distributed.checkpoint` keeps, in the header of such a file, where each slice begins in its tensor."""
PIECE = 2**24
"""Bytes that are hashed and written at once."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] = {}) -> str:
    """Writes `tensors`, from any device, and puts them on the disk; returns the SHA-256 of the file.

    One tensor at a time is copied to main memory, unless it is there. `offsets` are given where these are slices of
    larger tensors: the index at which each begins. Raises OSError.
    """
    slices = {name: {OFFSETS: list(offset)} for name, offset in offsets.items()}
    head, order = layout(tensors, {SLICES: json.dumps(slices)} if slices else None)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        digest.update(head)
        file.write(head)
        for name in order:
            whole = content(tensors[name])
            for begin in range(0, len(whole), PIECE):
                piece = whole[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


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
