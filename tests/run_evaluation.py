"""Evaluates sets of large pictures and says how much memory it took: `python -m tests.run_evaluation FOLDER`.

Lines `peak WHAT MEGABYTES`, on standard error. Mapped files are not counted: the system takes their pages back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cdm.evaluation.features import PixelFeatures, extract, load_extractor
from cdm.evaluation.judge import Judge, JudgeConfig
from cdm.evaluation.samples import RealPictures, read_real
from tests.sample_sets import (
    PER_PROMPT,
    TEXTS,
    evaluated,
    noise_pictures,
    open_sets,
    parameters,
    write_real,
    write_sets,
)

SIDE = 1024


def held() -> int:
    """Bytes of memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Says what the block takes at its peak, beyond what there is before it."""
    before, over = held(), threading.Event()
    peak = [before]

    def look() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    print(f"peak {what} {(peak[0] - before) / 1e6:.0f}", file=sys.stderr)


def write(folder: Path) -> None:
    """The sets, all of them of the same pictures, and real ones."""
    images = noise_pictures(0, len(TEXTS) * PER_PROMPT, SIDE)
    names = ("student1", "student4", "teacher4", "teacher50")
    write_sets(folder / "sets", **dict.fromkeys(names, images))
    prompts = [text for text in TEXTS for _ in range(PER_PROMPT)]
    write_real(folder / "real.safetensors", images, prompts)


if __name__ == "__main__":
    folder, params = Path(sys.argv[1]), parameters()
    write(folder)
    samples = open_sets(params, folder / "sets")
    with watched("pixels"):
        evaluated(params, samples, read_real(folder / "real.safetensors", TEXTS), PixelFeatures())
    with torch.random.fork_rng():
        Judge(JudgeConfig({"ink": ["red", "blue", "pink"]})).eval().save(folder / "judge")
    judge, few = load_extractor(str(folder / "judge")), 6
    with watched("judge"):
        extract(judge, RealPictures(samples.full.pictures(range(few)), torch.zeros(few)).batches())
