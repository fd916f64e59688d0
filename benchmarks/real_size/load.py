"""What one stage loads, alone: `python -m benchmarks.real_size.load FOLDER PART`.

PART is `encoders`, of the stage `prompts`, `drawing`, of the stages `latents` and `sample`, or `autoencoder`, of
pictures while training; in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cdm.families import get_family

PARTS = {
    "encoders": {"image": False, "transformer": False},
    "drawing": {"text": False},
    "autoencoder": {"text": False, "transformer": False},
}
"""What `Family.load_pipeline` is told."""

if __name__ == "__main__":
    get_family("sd3").load_pipeline(Path(sys.argv[1]), dtype=torch.bfloat16, **PARTS[sys.argv[2]])
