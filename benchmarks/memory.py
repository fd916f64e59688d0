"""The plan's memory against a measured peak: rounds of the real engine on the CPU, each case in its own process.

    python -m benchmarks.memory [PARAMS.yaml]

`allocated` is the peak of torch's CPU allocator (torch's profiler), `resident` the growth of the process's peak
resident memory, which adds what the system's allocator keeps and the code that the first round loads. The table is
that of docs/planning.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from cdm.families import get_family
from cdm.params import Params, load, parse
from cdm.planning.architecture import Architecture, find
from cdm.planning.memory import MemoryPlanner
from cdm.training.distiller import Distiller
from cdm.training.networks import FullNetworks, LoraNetworks, Networks
from cdm.training.state import TrainingState

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


def rounds(params: Params, architecture: Architecture, count: int = 2) -> None:
    """The engine's first rounds, with everything that a run keeps, on random prompts."""
    family, source = get_family(params.teacher.family), Path(params.teacher.source)
    teacher, lora = family.load_transformer(source), params.distill.lora
    options: dict[str, Any] = {
        "autocast": torch.bfloat16 if params.distill.precision == "bf16" else None,
        "gradient_checkpointing": params.distill.gradient_checkpointing,
    }
    networks: Networks = (
        FullNetworks(family, teacher, **options)
        if lora is None
        else LoraNetworks(family, teacher, lora, seed=0, **options)
    )
    del teacher
    state = TrainingState.start(networks, params.distill)
    inputs = {
        name: torch.randn_like(value)
        for name, value in architecture.inputs(1).items()
        if name in architecture.text_shapes
    }
    distiller = Distiller(
        networks,
        state.student,
        state.fake,
        distill=params.distill,
        schedule=params.schedule,
        shift=architecture.shift,
        seed=0,
        prompts=lambda _, samples: {name: v.repeat_interleave(len(samples), 0) for name, v in inputs.items()},
        empty=inputs,
        latent_shape=family.latent_shape(source),
        samples=range(params.distill.batch_size),
        micro_batch=params.runtime.micro_batch,
    )
    for number in range(count):
        distiller.round(number * params.distill.student_every)
        state.update_average(params.distill.ema)


def measure(params: Params, how: str) -> int:
    """Bytes at the peak of `rounds` in this process, by the `allocated` or the `resident` measure."""
    architecture = find(params.teacher, params.prompts.max_sequence_length)
    if how == "resident":
        architecture.family.count_parameters(architecture.configs)  # loads the libraries
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rounds(params, architecture)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        rounds(params, architecture)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


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
    typer.run(main)
