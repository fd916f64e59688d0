"""Devices and precisions by their names in params files and commands."""

from __future__ import annotations

import torch

from cdm.errors import CdmError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by their names in params files and commands."""


def choose_device(name: str) -> torch.device:
    """The torch device `name`, or the best there is for `auto`; CdmError if this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CdmError(f"the device {name!r} cannot be used here: {reason}") from None
    return torch.device(name)
