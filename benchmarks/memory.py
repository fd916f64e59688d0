"""The plan's memory against a measured peak: rounds of the real engine on the CPU, each case in its own process.

    python -m benchmarks.memory [PARAMS.yaml]

`allocated` is the peak of torch's CPU allocator (torch's profiler), `resident` the growth of the process's peak
resident memory, which adds what the system's allocator keeps and the code that the first round loads. The table is
that of docs/planning.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cdm.params import Params, load, parse
from cdm.planning.architecture import find
from cdm.planning.memory import MemoryPlanner
from cdm.system import boundary
from reference.memory import measure

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "full, fp32": {},
    "gradient checkpointing": {"distill": {"gradient_checkpointing": True}},
    "micro-batches of 12": {"runtime": {"micro_batch": 12}},
    "both": {"distill": {"gradient_checkpointing": True}, "runtime": {"micro_batch": 12}},
    "bf16": {"distill": {"precision": "bf16"}},
    "LoRA of rank 8, fp32": {"distill": {"lora": {"rank": 8, "alpha": 16.0}, "fake_knows_level": False}},
}


def case_params(params: Params, case: str) -> Params:
    values = params.model_dump()
    values["runtime"] |= {"device": "cpu", "micro_batch": None}
    values["distill"] |= {"fake_only": 0, "precision": "fp32", "lora": None, "gradient_checkpointing": False}
    for section, changes in CASES[case].items():
        values[section] |= changes
    return parse(values)


def main(
    file: Annotated[Path, typer.Argument(help="A params file with the teacher in a folder.")] = Path(
        "params.yaml"
    ),
    case: Annotated[str, typer.Option(hidden=True)] = "",
    how: Annotated[str, typer.Option(hidden=True)] = "allocated",
) -> None:
    """Compare the planned memory with the measured one."""
    params = load(file)
    if case:
        print(json.dumps(measure(case_params(params, case), how)))
        return
    architecture = find(params.teacher, params.prompts.max_sequence_length)
    print(f"| batch of {params.distill.batch_size} | planned | allocated | ratio | resident | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in CASES:
        chosen = case_params(params, name)
        planner = MemoryPlanner(chosen, architecture, 1, "none")
        planned = planner.plan(chosen.distill.gradient_checkpointing).peak
        cells = [name, f"{planned / 1e6:.1f} MB"]
        for measure_name in ("allocated", "resident"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                str(file),
                "--case",
                name,
                "--how",
                measure_name,
            ]
            value = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            cells += [f"{value / 1e6:.1f} MB", f"{planned / value:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    boundary.run(boundary.program(main))
