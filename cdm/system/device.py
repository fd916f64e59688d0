"""Devices and precisions by their names in params files and commands."""

from __future__ import annotations

import os

import torch

from cdm.errors import CdmError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by their names in params files and commands."""


def choose_device(name: str) -> torch.device:
    """The torch device `name`, or the best there is for `auto`; CdmError if this machine has none such.

    A GPU becomes the current one, before anything touches another: each that is touched keeps some of its memory for
    this process. In a process that was launched with others `cuda` is the GPU of its number on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            if ":" not in name and "LOCAL_RANK" in os.environ:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            if ":" in str(device):
                torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CdmError(f"the device {name!r} cannot be used here: {reason}") from None
    return device
