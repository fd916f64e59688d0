"""Configs of a diffusers folder: JSON files that say what its parts are. Reading them needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdm.errors import CdmError

INDEX = "model_index.json"
"""The file of a diffusers folder that names the parts of its pipeline."""
TRANSFORMER, AUTOENCODER = "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"

Configs = Path | Mapping[str, Mapping[str, Any]]
"""Where configs are read: a diffusers folder, or the contents of such files by their paths in one."""


def read_config(source: Configs, name: str) -> dict[str, Any]:
    """The JSON file `name` of a diffusers folder, or what is known of it; raises CdmError if it cannot be read."""
    if isinstance(source, Mapping):
        return dict(source[name])
    try:
        config: Any = json.loads((source / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CdmError(f"{source / name}: not a readable config of a diffusers folder ({error})") from None
    if not isinstance(config, dict):
        raise CdmError(f"{source / name}: not a readable config of a diffusers folder (it is no JSON object)")
    return config
