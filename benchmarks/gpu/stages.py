"""All six stages on a teacher of the scale's size, of random weights in files as published: seconds and memory.

They run one after another as processes, on the device and, smaller pictures, on the processor alone. The recipe is that
of a LoRA on one card of 24 GB, with few prompts, samples and iterations.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.miniature import STAGES, copy_with
from benchmarks.gpu.report import RECIPE
from benchmarks.gpu.sampling import t5_tokens
from benchmarks.gpu.scale import Scale
from benchmarks.real_size import folder as files
from reference import watched

WORDS = ("red", "green", "blue", "white", "black", "small", "large", "seven")
CPU_RESOLUTION = 256
CLAIMED, READY, TEACHER = "claimed", "ready", "teacher"
THREADS = min(8, os.cpu_count() or 1)
"""Of the processor, so that a device's own processes are not held up."""
Changes = Mapping[str, Mapping[str, Any]]
"""Of parameters, by section."""
BETWEEN = 0.2
"""Seconds between two looks at the device's memory."""


def measure_on_cpu(scale: Scale, note: Any) -> None:
    """All stages on the processor alone."""
    teacher = make(scale, note)
    small = CPU_RESOLUTION if scale.name != "tiny" else None
    changes: Changes = {
        "teacher": {"resolution": small},
        "latents": {"steps": 1},
        "sample": {"steps": [1]},
        "schedule": {"max_len": 2},
        "distill": {"iterations": 2, "batch_size": 2},
    }
    run(scale, teacher, "cpu", note, changes)


def measure(scale: Scale, note: Any) -> None:
    """All stages on the device."""
    run(scale, make(scale, note), scale.device, note, {})


def make(scale: Scale, note: Any) -> Path:
    """The folder of the teacher: of two parts the first to ask makes its files, and the other waits for them."""
    work = note.path.parent
    try:
        (work / CLAIMED).mkdir()
    except FileExistsError:
        while not (work / READY).exists():
            time.sleep(BETWEEN)
        return work / TEACHER
    start = time.monotonic()
    files.pipeline(work / TEACHER, scale)
    (work / READY).touch()
    size = sum(path.stat().st_size for path in (work / TEACHER).rglob("*") if path.is_file())
    note(teacher_bytes=size, teacher_seconds=time.monotonic() - start)
    return work / TEACHER


def run(
    scale: Scale, teacher: Path, device: str, note: Any, changes: Changes, words: Sequence[str] = WORDS
) -> None:
    """Every stage in a copy of the repository: its seconds, and its most bytes in main memory and on the device."""
    folder = Path(tempfile.mkdtemp(dir=teacher.parent))
    params = prepare(scale, teacher, device, folder, changes, words)
    note(resolution=params["teacher"]["resolution"], batch=params["distill"]["batch_size"])
    rows: list[dict[str, Any]] = []
    for name in STAGES:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *_elsewhere()])}
        if device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(THREADS)}
        with device_memory(device) as most:
            (peaks,) = watched.watch([[sys.executable, "-m", f"stages.{name}"]], [environment], folder)
        rows.append({"stage": name, "seconds": peaks.seconds, "anonymous": peaks.anonymous, **most})
        note(stages=rows)
    shutil.rmtree(folder, ignore_errors=True)


def prepare(
    scale: Scale, teacher: Path, device: str, folder: Path, changes: Changes, words: Sequence[str]
) -> dict[str, Any]:
    """Puts code, a prompt for every pair of words, and parameters into the folder; the parameters."""
    prompts = [f"a {one} house beside a {other} tree" for one in words for other in words]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    lora = {"rank": scale.rank, "alpha": 2 * scale.rank, "targets": "attention", "base": "precision"}
    few: dict[str, dict[str, Any]] = {
        "teacher": {"source": str(teacher)},
        "prompts": {
            "train": ["prompts.txt"],
            "eval": [],
            "eval_count": 4,
            "max_sequence_length": t5_tokens(scale),
        },
        "latents": {"steps": scale.max_len, "per_prompt": 2},
        "schedule": {"max_len": scale.max_len},
        "distill": {"iterations": 4, "lora": lora},
        "sample": {"steps": [1, 4], "teacher_steps": [4], "pictures": 4},
        "evaluate": {"neighbours": 1, "resamples": 10, "metrics": []},
        "runtime": {"device": device, "pictures_every": 2},
    }
    every = {section: {**values, **changes.get(section, {})} for section, values in few.items()}
    return copy_with(folder, ROOT / f"recipes/{RECIPE}.yaml", every)


def _elsewhere() -> list[str]:
    """Where packages lie beside those that are installed: the paths given, but the repository."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in given if path and Path(path).resolve() != ROOT]


@contextmanager
def device_memory(device: str) -> Iterator[dict[str, int]]:
    """The most bytes that were in use on the device meanwhile, beyond those before: by others too."""
    most: dict[str, int] = {}
    if device == "cpu":
        yield most
        return
    before = _in_use(device)
    most["device"] = 0
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(BETWEEN):
            most["device"] = max(most["device"], _in_use(device) - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _in_use(device: str) -> int:
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total - free
