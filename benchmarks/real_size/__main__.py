"""Makes the teacher, starts trainings of it one after the other, and loads what stages load: tables and JSON.

    python -m benchmarks.real_size [--work FOLDER] [--out FOLDER] [--part PART]

It needs 20 GB of disk in the work folder, 18 GB of main memory and a few minutes. The teacher is made once.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu import stages
from benchmarks.gpu.scale import DEFAULT
from benchmarks.real_size import ROOT, folder
from benchmarks.real_size.load import PARTS
from cdm.params import Params, load, parse
from cdm.planning.architecture import find
from cdm.planning.memory import MemoryPlanner
from cdm.system import boundary
from reference import watched

HALF = 12
"""Of the 24 blocks: networks of all weights, in two processes, would take 29 GB."""


@dataclass(frozen=True)
class Case:
    """A training that is started."""

    recipe: str
    teacher: str
    processes: int
    distill: Mapping[str, Any]


CASES = {
    "LoRA of rank 64, bf16": Case("sd3-medium-lora-24gb", "whole", 1, {}),
    "the same, two processes (FSDP2)": Case("sd3-medium-lora-24gb", "whole", 2, {}),
    "all weights, bf16, half the blocks, two processes": Case("sd3-medium", "half", 2, {}),
}

EVERY_STAGE = "all stages at 256 x 256"
CHANGES: stages.Changes = {
    "teacher": {"resolution": stages.CPU_RESOLUTION},
    "prompts": {"eval_count": 2, "max_sequence_length": 32},
    "latents": {"steps": 1, "per_prompt": 2, "precision": "fp32"},
    "schedule": {"max_len": 2},
    "distill": {"iterations": 2, "batch_size": 1, "precision": "fp32"},
    "sample": {"steps": [1], "teacher_steps": [1], "pictures": 2},
    "runtime": {"micro_batch": None, "pictures_every": 0},
}
"""Of `sd3-medium-lora-24gb`: as little as makes every stage work once. The text encoders, 5.6 billion parameters, stay
in bfloat16; the transformer is in float32, because processors without units for bfloat16 are slow with it."""
WORDS = ("red", "green")


def make(work: Path) -> None:
    """The teacher, and one of half the blocks that has its other parts too."""
    if (work / "done").exists():
        return
    folder.pipeline(work / "whole")
    folder.transformer(work / "half", HALF)
    for part in (work / "whole").iterdir():
        if part.name != "transformer" and not (work / "half" / part.name).exists():
            (work / "half" / part.name).symlink_to(part)
    (work / "done").touch()


def start(case: Case, work: Path) -> dict[str, Any]:
    """Bytes of each process, beside those that its libraries take."""
    params = settings(case, work)
    (work / "params.json").write_text(params.model_dump_json())
    outs = [work / f"start-{rank}.json" for rank in range(case.processes)]
    command = [sys.executable, "-m", "reference.start", str(work / "params.json")]
    peaks = watched.watch([[*command, str(out), "0"] for out in outs], watched.processes(case.processes), ROOT)
    said = [json.loads(out.read_text()) for out in outs]
    sharding: Any = "fsdp" if case.processes > 1 else "none"
    planner = MemoryPlanner(
        params, find(params.teacher, params.prompts.max_sequence_length), case.processes, sharding
    )
    return {
        "libraries": said[0]["before"],
        "peak": [peak.anonymous for peak in peaks],
        "growth": [peak.anonymous - values["before"] for peak, values in zip(peaks, said, strict=True)],
        "weights": said[0]["everywhere"],
        "bound": said[0]["everywhere"] // case.processes + said[0]["block"],
        "planned": sum(planner.networks().values()),
    }


def settings(case: Case, work: Path) -> Params:
    """The recipe's, on the CPU."""
    values = load(ROOT / "recipes" / f"{case.recipe}.yaml").model_dump()
    values["teacher"] |= {"source": str(work / case.teacher)}
    values["distill"] |= case.distill
    values["runtime"] |= {"device": "cpu", "accelerate_config": None}
    return parse(values)


def loaded(part: str, work: Path) -> dict[str, Any]:
    """Bytes of a process that loads what a stage loads."""
    command = [sys.executable, "-m", "benchmarks.real_size.load", str(work / "whole"), part]
    (peak,) = watched.watch([command], [dict(os.environ)], ROOT)
    return {"peak": [peak.anonymous]}


def all_stages(teacher: Path) -> dict[str, Any]:
    """Seconds and bytes of every stage, one after the other, on the processor alone."""
    found: dict[str, Any] = {}
    stages.run(DEFAULT, teacher, "cpu", lambda **values: found.update(values), CHANGES, WORDS)
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In GB of 1000 MB."""
    lines = [
        "| | libraries | weights | planned | grew by | at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in results.items():
        single = [values.get(key) for key in ("libraries", "weights", "planned")]
        several = [values.get(key) for key in ("growth", "peak")]
        cells = ["" if value is None else f"{value / 1e9:.2f}" for value in single]
        cells += [
            "" if value is None else ", ".join(f"{each / 1e9:.2f}" for each in value) for value in several
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main(
    work: Annotated[Path, typer.Option(help="Where the teacher is made, and stays.")] = Path("real-size"),
    out: Annotated[Path, typer.Option(help="Where results are written.")] = ROOT / "benchmarks/results",
    part: Annotated[list[str] | None, typer.Option(help="Names of cases; all without it.")] = None,
) -> None:
    """Measure the main memory that SD3-Medium takes to start with."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    make(work)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda case=case: start(case, work)  # type: ignore[misc]
        for name, case in CASES.items()
    }
    runs |= {f"loading: {name}": lambda name=name: loaded(name, work) for name in PARTS}  # type: ignore[misc]
    runs[EVERY_STAGE] = lambda: all_stages(work / "whole")
    file = out / "real-size.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, run in runs.items():
        if not part or name in part:
            results[name] = run()
            machine = {"processor": platform.machine(), "cores": os.cpu_count()}
            file.write_text(json.dumps(results | {"machine": machine}, indent=2) + "\n")
    measured = {name: results[name] for name in runs if name in results}
    stage_rows = measured.pop(EVERY_STAGE, {}).get("stages", [])
    print(table(measured))
    for row in stage_rows:
        print(f"{row['stage']:10}{row['seconds']:>8.0f} s{row['anonymous'] / 1e9:>8.2f} GB")


if __name__ == "__main__":
    boundary.run(boundary.program(main))
