"""What processes of the tests import before they are forked (see tests/launching.py)."""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401

import cdm.data.sampling
import cdm.training.loop  # noqa: F401

torch.set_num_threads(1)
