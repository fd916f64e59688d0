"""Monitoring of a training: times, a tracker, pictures. It changes nothing of the student.

The quality probe, which may choose the student, is in `cdm.training.probe`.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdm.families import Conditioning
from cdm.params import Params
from cdm.system.circumstances import Circumstances
from cdm.system.device import DTYPES
from cdm.system.files import write_json, write_text
from cdm.training.distiller import Distiller
from cdm.training.inputs import Inputs
from cdm.training.networks import Networks, Role, Trained
from cdm.training.probe import falls_due

if TYPE_CHECKING:
    from cdm.training.pictures import Gallery

TRACKER_ID = "tracker-id"
TIMES = "times.jsonl"


@dataclass(frozen=True)
class Places:
    """Paths that monitoring writes to: a folder of pictures, a JSON file of times, a folder of trackers' files."""

    pictures: Path
    timing: Path
    trackers: Path


class Stopwatch:
    """The seconds that each part of a training takes.

    On CUDA, work is queued: there, events in the stream take the time where the work runs, and only `read` waits
    for the device. On other accelerators a part's time is that of queueing it; the totals are right everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)

    def read(self) -> dict[str, float]:
        """The seconds since the last `read`, which it forgets."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for name, start, end in self._events:
                self._add(name, start.elapsed_time(end) / 1000)
        seconds, self.seconds, self._events = self.seconds, {}, []
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class TimedNetworks:
    """`networks` whose forward and backward passes are timed.

    Forward passes of the student without a graph count as `rollout` (its simulation, and predictions that need no
    gradient); `student` and `fake` are the forward and backward passes of their updates.
    """

    def __init__(self, networks: Networks, stopwatch: Stopwatch) -> None:
        self.networks, self.stopwatch = networks, stopwatch

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        simulated = role == "student" and not torch.is_grad_enabled()
        with self.stopwatch.measure("rollout" if simulated else role):
            return self.networks.velocity(role, x, sigma, conditioning)

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return self.networks.parameters(role)

    def casting_once(self) -> AbstractContextManager[object]:
        return self.networks.casting_once()

    def backward(self, role: Trained, loss: Tensor) -> None:
        with self.stopwatch.measure(role):
            self.networks.backward(role, loss)

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        self.networks.save_student(weights, source, folder)


class Watch:
    """Times the rounds of a training, shows pictures, and tells the tracker of `accelerator`, if it has one.

    A round is of `samples` samples, all processes and iterations of it together. Times and pictures, these
    `every` so many iterations and at the `last`, are written to `places`; without `places` nothing is written.
    The times of each round are kept in the file `kept`, so that an interrupted training counts all of its rounds.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stopwatch: Stopwatch,
        samples: int,
        places: Places | None,
        gallery: Gallery | None = None,
        every: int = 0,
        last: int = 0,
        kept: Path | None = None,
    ) -> None:
        self.accelerator, self.stopwatch, self.samples = accelerator, stopwatch, samples
        self.places, self.gallery, self.every, self.last = places, gallery, every, last
        self.kept = kept if accelerator.is_main_process else None
        self.iteration = self.rounds = 0
        self.newest: dict[str, float] = {}
        self.totals: dict[str, float] = {}
        self.circumstances: Circumstances | None = None

    @contextmanager
    def running(self, iteration: int) -> Iterator[None]:
        """Around a training that begins or goes on at `iteration`, however it ends."""
        self.iteration = iteration
        self._take_up()
        if self.accelerator.is_main_process and self.places is not None:
            self.circumstances = Circumstances.now(str(self.accelerator.device))
        if self.gallery is not None:
            self.gallery.open(iteration)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            if self.accelerator.is_main_process and self.places is not None and self.rounds:
                write_json(self.places.timing, self.timing())
                print(self.summary())

    @contextmanager
    def round(self) -> Iterator[None]:
        """Around the training of one round."""
        begun = time.perf_counter()
        yield
        parts = self.stopwatch.read()
        self.newest = {"round": time.perf_counter() - begun, **parts}
        self._count(self.newest)

    def after_round(
        self,
        rows: Sequence[Mapping[str, float]],
        student: Mapping[str, Tensor],
        average: Mapping[str, Tensor],
    ) -> None:
        """Shows the newest of the log's `rows`, and now and then pictures; parameters end as they were."""
        since, self.iteration = self.iteration, int(rows[-1]["iteration"])
        if self.kept is not None:
            with self.kept.open("a") as file:
                print(json.dumps({"iteration": self.iteration, "seconds": self.newest}), file=file)
        if self.accelerator.trackers:
            times = {f"seconds_{name}": seconds for name, seconds in self.newest.items()}
            rate = {"samples_per_second": self.samples / self.newest["round"]}
            self.accelerator.log({**rows[-1], **times, **rate}, step=self.iteration)
        if self.gallery is not None and falls_due(self.every, since, self.iteration, self.last):
            self.gallery.show(self.iteration, rows, student, average)

    def timing(self) -> dict[str, Any]:
        """Rounds, samples a second, and the seconds of each part of the training; after an interruption those before
        it count too, but not those of rounds that were lost and trained again.

        `other` is all but the networks: optimisers, averages, random numbers, waiting for other processes. With them
        are the circumstances at the beginning.
        """
        parts = {name: seconds for name, seconds in self.totals.items() if name != "round"}
        total = self.totals["round"]
        return {
            "rounds": self.rounds,
            "seconds": total,
            "samples_per_second": self.rounds * self.samples / total,
            "seconds_in": {**parts, "other": total - sum(parts.values())},
            "circumstances": self.circumstances and self.circumstances.as_dict(),
        }

    def _count(self, seconds: Mapping[str, float]) -> None:
        """Adds a round to the totals."""
        for name, value in seconds.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.rounds += 1

    def _take_up(self) -> None:
        """Counts the rounds up to this iteration that an interrupted run has kept, and forgets those after it."""
        if self.kept is None:
            return
        lines = self.kept.read_text().splitlines() if self.kept.exists() else []
        rounds = [entry for entry in map(_entry, lines) if entry and entry["iteration"] <= self.iteration]
        for entry in rounds:
            self._count(entry["seconds"])
        write_text(self.kept, "".join(f"{json.dumps(entry)}\n" for entry in rounds))

    def summary(self) -> str:
        """`timing` in one line."""
        timing = self.timing()
        parts = sorted(timing["seconds_in"].items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {seconds / timing['seconds']:.0%}" for name, seconds in parts)
        rate = f"{timing['samples_per_second']:.1f} samples/s"
        return f"{timing['rounds']} rounds in {timing['seconds']:.0f} s, {rate}: {shares}"


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the times; None for one that a crash has torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def open_watch(
    params: Params,
    inputs: Inputs,
    distiller: Distiller,
    accelerator: Accelerator,
    places: Places | None,
    folder: Path,
) -> Watch:
    """A watch on `distiller`, whose networks it puts on a stopwatch; what is to outlive an interruption is kept
    beside the checkpoints in `folder`."""
    stopwatch, networks, every = (
        Stopwatch(accelerator.device),
        distiller.networks,
        params.runtime.pictures_every,
    )
    samples = params.distill.batch_size * params.distill.student_every
    distiller.networks = TimedNetworks(networks, stopwatch)
    if places is None:
        return Watch(accelerator, stopwatch, samples, None)
    gallery = None
    if every:
        from cdm.training.pictures import Gallery, Subject

        gallery = Gallery(
            inputs.family,
            inputs.source,
            Subject.choose(params, inputs.evaluation, inputs.empty, inputs.latent_shape),
            networks,
            seed=params.seed,
            shift=inputs.shift,
            batch=len(distiller.parts[0]),
            dtype=DTYPES[params.latents.precision],
            accelerator=accelerator,
            kept=folder / "pictures",
            out=places.pictures,
        )
    elif accelerator.is_main_process:
        shutil.rmtree(places.pictures, ignore_errors=True)
        places.pictures.mkdir(parents=True)
    if params.runtime.tracker is not None:
        sections = params.model_dump(mode="json", include={"seed", "teacher", "schedule", "distill"})
        _start_tracker(accelerator, folder, places, sections)
    return Watch(
        accelerator, stopwatch, samples, places, gallery, every, params.distill.iterations, folder / TIMES
    )


def _start_tracker(
    accelerator: Accelerator, folder: Path, places: Places, parameters: Mapping[str, Any]
) -> None:
    """Begins the run of the tracker that `accelerator` was made with, or goes on with it after an interruption.

    `folder` is that of the experiment's checkpoints: what lies there is gone when the experiment is done.
    """
    wandb: dict[str, Any] = {}
    if accelerator.is_main_process:
        identity = folder / TRACKER_ID
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        places.trackers.mkdir(parents=True, exist_ok=True)
        wandb = {"id": identity.read_text(), "resume": "allow", "name": folder.name, "config": parameters}
        wandb["dir"] = str(places.trackers)
    accelerator.init_trackers("cdm", init_kwargs={"wandb": wandb})
