"""The miniature's pipeline on the device, stage by stage as processes, in a copy of the repository."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.gpu.scale import ROOT, Scale

COPIED = ("cdm", "stages", "miniature")
SHARED, OWN = ("teacher", "prompts", "latents"), ("distill", "sample", "evaluate")


def measure(scale: Scale, note: Any) -> None:
    """Seconds of each stage, and the quality, in each precision: they train at the same time."""
    work = Path(tempfile.mkdtemp())
    try:
        first = copy(scale, work / scale.precisions[0], scale.precisions[0])
        shared: dict[str, float] = {}
        for name in SHARED:
            shared[name] = run_stage(name, first)
            note(shared=shared)
        folders = {scale.precisions[0]: first}
        for precision in scale.precisions[1:]:
            folders[precision] = copy(scale, work / precision, precision)
            shutil.copytree(first / "data", folders[precision] / "data")
        found: dict[str, dict[str, Any]] = {precision: {} for precision in folders}

        def finish(precision: str) -> None:
            folder, own = folders[precision], found[precision]
            own["seconds"] = {}
            for name in OWN:
                own["seconds"][name] = run_stage(name, folder)
                note(precisions=found)
            own["quality"] = json.loads((folder / "metrics/quality.json").read_text())
            with (folder / "logs/distill.csv").open() as rows:
                own["last_losses"] = list(csv.DictReader(rows))[-1]
            note(precisions=found)

        with ThreadPoolExecutor() as threads:
            for done in [threads.submit(finish, precision) for precision in folders]:
                done.result()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy(scale: Scale, folder: Path, precision: str) -> Path:
    """The stages with the miniature and its parameters, changed for this scale and `precision`."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    for section, values in scale.miniature.items():
        params[section] |= values
    params["distill"]["precision"] = precision
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return folder


def run_stage(name: str, folder: Path) -> float:
    """Seconds of a stage; RuntimeError with the end of its output if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{name}"], cwd=folder, check=False, text=True, capture_output=True
    )
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"stage {name} in {folder.name}: exit code {done.returncode}\n{end}")
    return time.perf_counter() - start
