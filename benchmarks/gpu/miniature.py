"""The miniature's pipeline on the device, stage by stage as processes, in a copy of the repository."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.gpu import ROOT
from benchmarks.gpu.scale import Scale

COPIED = ("cdm", "stages", "miniature")
STAGES = ("teacher", "prompts", "latents", "distill", "sample", "evaluate")


def measure(scale: Scale, note: Any) -> None:
    """Seconds of each stage, the last losses, and the quality of teacher and student."""
    folder = Path(tempfile.mkdtemp())
    try:
        iterations = copy(scale, folder)
        note(iterations=iterations)
        seconds: dict[str, float] = {}
        for name in STAGES:
            seconds[name] = run_stage(name, folder)
            note(seconds=seconds)
        with (folder / "logs/distill.csv").open() as rows:
            note(last_losses=list(csv.DictReader(rows))[-1])
        note(quality=json.loads((folder / "metrics/quality.json").read_text()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy(scale: Scale, folder: Path) -> int:
    """Puts the stages, the miniature and its parameters, changed for this scale, into the folder; its iterations."""
    params = copy_with(folder, ROOT / "params.yaml", scale.miniature)
    return int(params["distill"]["iterations"])


def copy_with(folder: Path, file: Path, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Puts the code, and the parameters of `file` with `changes` by section, into the folder; these parameters."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    yaml = YAML(typ="safe")
    params: dict[str, Any] = yaml.load(file.read_text())
    for section, values in changes.items():
        params[section] |= values
    with (folder / "params.yaml").open("w") as out:
        yaml.dump(params, out)
    return params


def run_stage(name: str, folder: Path) -> float:
    """Seconds of a stage; RuntimeError with the end of its output if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{name}"], cwd=folder, check=False, text=True, capture_output=True
    )
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"stage {name}: exit code {done.returncode}\n{end}")
    return time.perf_counter() - start
