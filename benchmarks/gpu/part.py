"""One part in a process of its own: `python -m benchmarks.gpu.part NAME SCALE RESULT.json`.

It imports what it needs, and begins with the first line on its standard input: so the next part is ready when one
ends. What it finds is in the file at once, part by part: where it fails or is stopped, that much is kept.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

PARTS: dict[str, tuple[str, str]] = {
    "plans": ("plans", "measure"),
    "machine": ("machine", "measure"),
    "lora": ("training", "measure_lora"),
    "full": ("training", "measure_full"),
    "sampling": ("sampling", "measure"),
    "cpu_stages": ("stages", "measure_on_cpu"),
    "stages": ("stages", "measure"),
    "miniature": ("miniature", "measure"),
    "tests": ("tests", "measure"),
    "settings": ("training", "measure_settings"),
    "compile": ("training", "measure_compile"),
    "allocator": ("training", "measure_allocator"),
    "compiled_round": ("training", "measure_compiled_round"),
}
"""The module and the function of each."""


class Notes:
    """What a part has found, in a JSON file that is always whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def __call__(self, **found: Any) -> None:
        self.found |= found
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.found))
        temporary.replace(self.path)


def load(name: str) -> Callable[..., None]:
    """The function of a part."""
    module, function = PARTS[name]
    measure: Callable[..., None] = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return measure


def preload(name: str) -> None:
    """Imports what takes long, and nothing that would touch the device."""
    if PARTS[name][0] in ("training", "sampling", "plans", "stages"):
        import_module("diffusers.models.transformers.transformer_sd3")
    if name in ("sampling", "cpu_stages"):
        import_module("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3")


def main() -> None:
    """Run a part."""
    name, scale, result = sys.argv[1:]
    measure = load(name)
    preload(name)
    from benchmarks.gpu.scale import SCALES

    if not sys.stdin.readline():
        return  # nobody wants it any more
    if name in ("plans", "cpu_stages"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    measure(SCALES[scale], Notes(Path(result)))


if __name__ == "__main__":
    main()
