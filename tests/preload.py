"""What processes of the tests import before they are forked (see tests/launching.py)."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline  # noqa: F401

import cdm.data.sampling
import cdm.training.loop  # noqa: F401
