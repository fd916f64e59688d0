"""A plan as a table to print; sizes in units of 1000."""

from __future__ import annotations

from collections.abc import Sequence

from cdm.params import Distill
from cdm.planning.memory import Memory
from cdm.planning.plan import Compute, Disk, Plan

BUSY = 0.7
"""Share of their time in which threads have a processor below which a machine is busy with other work."""


def table(plan: Plan, distill: Distill, peak_flops: float, utilisation: float) -> list[str]:
    """Lines of the plan of a training with the settings `distill`, on GPUs of `peak_flops` FLOP/s used to
    `utilisation`, or on the CPU whose speed the plan has."""
    compute, disk = plan.compute, plan.disk
    sharding = "sharded (FSDP2)" if plan.sharding == "fsdp" else "each with all networks"
    processes = f"{plan.processes} processes, {sharding}" if plan.processes > 1 else "one process"
    learning = "all learn" if distill.lora is None else f"{plan.learning:,} of an adapter learn"
    base = distill.lora.base if distill.lora else "precision"
    rounded = "" if base == "precision" else f", the others in {base}"
    both = sorted((plan.memory, plan.memory_otherwise), key=lambda memory: memory.checkpointing)
    return [
        f"{plan.architecture}: {plan.parameters:,} parameters, {learning}, {distill.precision}{rounded}",
        f"{distill.iterations:,} iterations of {distill.batch_size} samples; {processes},"
        f" {plan.batch} samples each, {plan.micro_batch} at once",
        "",
        *_memory_lines(both, distill.gradient_checkpointing),
        *([_row("in main memory, a checkpoint to be written", [_bytes(plan.staging)])] if plan.staging else []),
        "",
        "main memory of a process, beside mapped files",
        _row("  at the start", [_bytes(plan.main_memory.start)]),
        _row("  training, at most", [_bytes(plan.main_memory.training)]),
        "",
        "compute, all processes",
        _row("forward-equivalents a sample, an iteration", [f"{compute.equivalents:.2f}"]),
        _row("a forward of a sample", [_flop(compute.forward_flops)]),
        _row("a forward with its backward", [_flop(compute.update_flops)]),
        _row("an iteration", [_flop(compute.iteration_flops)]),
        _row("the run", [_flop(compute.run_flops)]),
        *_time_lines(compute, peak_flops, utilisation),
        "",
        "disk",
        *_disk_lines(disk),
    ]


def _memory_lines(both: Sequence[Memory], checkpointing: bool) -> list[str]:
    marks = ["(set)" if memory.checkpointing == checkpointing else "" for memory in both]
    rows = [
        _row("memory of a process; gradient checkpointing", ["off", "on"]),
        *([_row("", marks)]),
        *(_row(f"  {name}", [_bytes(memory.kept[name]) for memory in both]) for name in both[0].kept),
        _row("beside these, at most", []),
        *(_row(f"  {name}", [_bytes(memory.moments[name]) for memory in both]) for name in both[0].moments),
        _row("  (what one graph of the student holds)", [_bytes(memory.activations) for memory in both]),
        _row("peak", [_bytes(memory.peak) for memory in both]),
    ]
    return [row.rstrip() for row in rows]


def _time_lines(compute: Compute, peak_flops: float, utilisation: float) -> list[str]:
    speed = compute.speed
    if speed is None:
        name = f"time at {peak_flops / 1e12:g} TFLOP/s a GPU, {utilisation:.0%} used"
        return [_row(name, [_time(compute.seconds)])]
    measured = f"{speed.samples} at once" if speed.scaled is None else f"{speed.scaled}, scaled by FLOPs"
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    busy = speed.share < BUSY
    alone = [_row("the run, if nothing else ran here, about", [_time(speed.share * compute.seconds)])]
    return [
        "",
        f"time on this CPU, {threads} (measured on {measured}; --flops: on a GPU)",
        _row("a forward of a sample", [_time(speed.forward)]),
        _row("a forward with its backward", [_time(speed.update)]),
        _row("the run", [_time(compute.seconds)]),
        *(alone if busy else []),
    ]


def _disk_lines(disk: Disk) -> list[str]:
    if disk.embeddings is None:
        embeddings = _row("  embeddings, a prompt (the lists cannot be read here)", [_bytes(disk.prompt)])
    else:
        embeddings = _row(f"  embeddings of {disk.prompts:,} prompts", [_bytes(disk.embeddings)])
    return [
        embeddings,
        _row("  checkpoints: two kept, one being written", [_bytes(disk.checkpoints)]),
        _row("  the student's weights", [_bytes(disk.student)]),
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<48}" + "".join(f"{cell:>12}" for cell in cells)


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} {units[-1]}" if value < 10_000 else f"{value:,.0f} {units[-1]}"


def _bytes(value: float) -> str:
    return _scaled(value, ["B", "kB", "MB", "GB"])


def _flop(value: float) -> str:
    return _scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:,.{1 if seconds < 360_000 else 0}f} h"
