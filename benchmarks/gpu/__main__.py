"""What this repository does on one GPU, without a network: `python -m benchmarks.gpu --out FOLDER`.

    python -m benchmarks.gpu --out results                       # within eight minutes, one card of 80 GB
    python -m benchmarks.gpu --out results --quick               # whether it all works, in two to three minutes
    python -m benchmarks.gpu --out results --parts compiled_round,settings     # what the time may not suffice for
    python -m benchmarks.gpu --out results --tiny                # a rehearsal on the CPU

Weights and prompts of SD3-Medium's size are random. Every part is a process with a time limit of its own, so that a
failure costs only itself; results are in FOLDER as soon as each part ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from benchmarks.gpu import ROOT
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.report import markdown
from cdm.system import boundary

ORDER: tuple[tuple[str, ...], ...] = (
    ("machine",),
    ("lora",),
    ("full",),
    ("sampling",),
    ("stages", "miniature", "tests"),  # at once: none of them keeps the device busy
    ("compiled_round",),
    ("compile",),
    ("settings",),
    ("allocator",),
)
"""By value: what the time does not suffice for is left out at the end."""
BESIDE = ("plans", "cpu_stages")
"""On the processor alone, from the beginning, beside all others."""
QUICK_ORDER: tuple[tuple[str, ...], ...] = (
    ("machine",),
    ("lora", "sampling"),
    ("full",),
    ("stages", "miniature", "tests", "settings", "compile", "allocator"),
)
"""Of a quick run: whether everything works, not how fast it is, so that parts share the device. A compiled round
would take too long."""
LIMITS = {
    "plans": 400,
    "cpu_stages": 560,
    "stages": 240,
    "machine": 60,
    "lora": 130,
    "full": 90,
    "sampling": 75,
    "miniature": 320,
    "tests": 200,
    "compile": 100,
    "settings": 80,
    "allocator": 60,
    "compiled_round": 400,
}
"""Seconds that a part may take on a GPU."""
LEAST = {"allocator": 50, "compiled_round": 120}
"""Seconds that must be left for a part to begin: without an entry, `LEAST_ELSE`."""
LEAST_ELSE = 15
SECONDS = 470.0
"""Of the whole: on an H200 about 190 for the parts before `stages`."""
ALLOCATOR = "expandable_segments:True"


@dataclass
class Process:
    """A part: ready, running, or done."""

    name: str
    scale: str
    folder: Path
    outcome: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    limit: float = 0.0

    def prepare(self) -> None:
        """Has the process import what it needs; it then waits."""
        self.result, self.log = self.folder / f"{self.name}.json", self.folder / f"{self.name}.log"
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        if self.scale == "tiny":
            environment["OMP_NUM_THREADS"] = "1"  # threads cost more than they save
        if self.name == "allocator":
            environment |= {"PYTORCH_ALLOC_CONF": ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR}
        command = [sys.executable, "-m", "benchmarks.gpu.part", self.name, self.scale, str(self.result)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def begin(self, left: float) -> None:
        """Lets it go, for its limit, which is for GPUs, or what is `left` of the time."""
        limit = left if self.scale == "tiny" else LIMITS[self.name]
        self.started, self.limit = time.monotonic(), min(limit, left)
        with suppress(BrokenPipeError):  # it has failed already
            self._stdin.write("go\n")
            self._stdin.close()

    def finish(self) -> None:
        """Waits for its end, or brings it about, and gathers what it has found."""
        stopped = False
        try:
            self.process.wait(max(0.1, self.started + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = True
        self.kill()
        code = self.process.wait()
        status = "stopped" if stopped else "failed" if code else "done"
        self.outcome = {"status": status, "seconds": round(time.monotonic() - self.started, 1)}
        if status == "stopped":
            self.outcome["error"] = f"took longer than {self.limit:.0f} seconds"
        if status != "done":
            self.outcome["log"] = self.log.read_text(errors="replace").splitlines()[-60:]
        if self.result.exists():
            self.outcome["found"] = json.loads(self.result.read_text())

    def leave_out(self) -> None:
        """Ends it before it has begun."""
        self.kill()
        self.process.wait()
        self._stdin.close()
        self.outcome = {"status": "left out", "seconds": 0.0, "error": "no time was left"}

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def kill(self) -> None:
        """Ends it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Session:
    """The parts one after another, and the results so far."""

    def __init__(self, out: Path, scale: str, parts: list[str], seconds: float) -> None:
        self.out, self.scale, self.seconds = out, scale, seconds
        self.start = time.monotonic()
        order = QUICK_ORDER if scale == "quick" else ORDER
        self.groups = [group for names in order if (group := [name for name in names if name in parts])]
        self.beside = [name for name in BESIDE if name in parts]
        self.results: dict[str, Any] = {
            "command": f"python -m benchmarks.gpu --out OUT{_options(scale, parts, seconds)}",
            "scale": scale,
            "parts": {},
        }

    @property
    def left(self) -> float:
        """Seconds of the whole that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def run(self) -> bool:
        """Runs everything; whether nothing failed or had to be stopped."""
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
            work = Path(folder)
            beside = [Process(name, self.scale, work) for name in self.beside]
            groups = [[Process(name, self.scale, work) for name in group] for group in self.groups]
            for process in [*beside, *(groups[0] if groups else [])]:
                process.prepare()
            ends = {}
            for process in beside:
                process.begin(self.left)
                ends[threads.submit(process.finish)] = process
            for index, group in enumerate(groups):
                self._run_group(group, groups[index + 1] if index + 1 < len(groups) else [], threads)
            for end in as_completed(ends):
                end.result()
                self._keep(ends[end])
        return all(each["status"] in ("done", "left out") for each in self.results["parts"].values())

    def _run_group(self, group: list[Process], following: list[Process], threads: ThreadPoolExecutor) -> None:
        left = self.left
        ends = {}
        for process in group:
            if left >= LEAST.get(process.name, LEAST_ELSE):
                process.begin(left)
                ends[threads.submit(process.finish)] = process
            else:
                ends[threads.submit(process.leave_out)] = process
        for process in following:
            process.prepare()
        for end in as_completed(ends):
            end.result()
            self._keep(ends[end])

    def _keep(self, process: Process) -> None:
        self.results["parts"][process.name] = process.outcome
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        for name, text in (
            ("gpu.json", json.dumps(self.results, indent=1) + "\n"),
            ("gpu.md", markdown(self.results)),
        ):
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(text)
            temporary.replace(self.out / name)
        print(f"{process.name}: {process.outcome['status']}, {process.outcome['seconds']} s", flush=True)
        for line in [process.outcome.get("error", ""), *process.outcome.get("log", [])[-12:]]:
            if line:
                print(f"  {line}", flush=True)


def _options(scale: str, parts: list[str], seconds: float) -> str:
    some = "" if set(parts) == set(PARTS) else f" --parts {','.join(parts)}"
    most = "" if seconds == SECONDS else f" --seconds {seconds:g}"
    return ("" if scale == "default" else f" --{scale}") + some + most


def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")],
    parts: Annotated[str, typer.Option(help="Only these, with commas between them.")] = ",".join(PARTS),
    quick: Annotated[
        bool, typer.Option(help="Whether it all works: few repetitions, parts at once, so no times to quote.")
    ] = False,
    tiny: Annotated[bool, typer.Option(help="A rehearsal with tiny sizes on the CPU.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Seconds for everything; what is left at the end is left out.")
    ] = SECONDS,
) -> None:
    """Measure on this machine's GPU."""
    chosen = parts.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown or (quick and tiny):
        raise typer.BadParameter(
            f"no such part: {', '.join(unknown)}" if unknown else "--quick or --tiny, not both"
        )
    out.mkdir(parents=True, exist_ok=True)
    done = Session(out, "tiny" if tiny else "quick" if quick else "default", chosen, seconds).run()
    print((out / "gpu.md").read_text())
    raise typer.Exit(0 if done else 1)


if __name__ == "__main__":
    boundary.run(boundary.program(main))
