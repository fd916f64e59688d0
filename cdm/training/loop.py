"""The loop around the training step: processes, moving average, log, checkpoints, stopping, the saved student."""

from __future__ import annotations

import csv
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from cdm.data.prompt_set import OnlinePrompts, PromptSet
from cdm.data.reference import Reference
from cdm.data.store import MANIFEST, Store
from cdm.errors import CdmError
from cdm.families import Conditioning, Family, get_family
from cdm.models.manifest import TeacherManifest
from cdm.models.student import FULL, LORA, Origin
from cdm.params import Params
from cdm.randomness import Draws, prompt_indices
from cdm.system.device import choose_device
from cdm.system.files import digest_of, sha256
from cdm.system.progress import track
from cdm.system.provenance import code_digest
from cdm.training import checkpoint, sharding
from cdm.training.checkpoint import Checkpoint
from cdm.training.distiller import Distiller, Metrics, Pairs
from cdm.training.networks import FullNetworks, LevelAwareFake, LoraNetworks, Networks
from cdm.training.optim import Learner, blend, ema_decay
from cdm.training.probe import Figures, QualityProbe, falls_due
from cdm.training.watch import Places, Watch, open_watch

SHAPING: dict[str, bool | set[str]] = {
    "seed": True,
    "prompts": {"embed", "max_sequence_length", "precision"},
    "schedule": True,
    "distill": True,
}
"""Parameters that shape a student, as `params` of the stage in dvc.yaml has them; texts of prompts count by hash."""


@dataclass(frozen=True)
class Inputs:
    """What a distillation starts from: a teacher on this disk, the training prompts, the empty prompt."""

    family: Family
    teacher: TeacherManifest
    source: Path
    prompts: PromptSet | OnlinePrompts
    empty: Conditioning
    latent_shape: tuple[int, ...]
    shift: float
    digests: list[str]
    """Hashes of what is read: part of the experiment's fingerprint."""
    evaluation: PromptSet
    """Prompts that are not learnt from, to look at."""
    reference: Reference | None
    """What a probe compares with, if there is one."""
    pairs: Store | None = None
    """Noise and the teacher's samples of training prompts, for a regression if there is one."""

    @classmethod
    def gather(
        cls,
        params: Params,
        teacher: TeacherManifest,
        prompts: Path,
        latents: Path | None = None,
        pairs: Path | None = None,
    ) -> Inputs:
        """The inputs that earlier stages have written: `latents` are read for a probe, `pairs` for a regression.

        Both lie beside the folder `prompts` unless they are given. Raises CdmError if one is missing.
        """
        source, family = teacher.folder(), get_family(teacher.family)
        texts, empty = PromptSet(prompts / "train"), PromptSet(prompts / "empty")
        online = params.prompts.embed == "online"
        train = OnlinePrompts(texts, family, source, params) if online else texts
        digests = [teacher.digest, train.sha256]
        reference = None
        if params.distill.probe.reference == "latents":
            reference = Reference.open(prompts, latents or prompts.with_name("latents"), teacher)
            digests.append(reference.digest)
        store = None
        if params.distill.losses.regression.weight:
            store = open_pairs(pairs or prompts.with_name("pairs"), teacher, train.sha256)
            digests.append(sha256(store.folder / MANIFEST))
        return cls(
            family,
            teacher,
            source,
            train,
            empty.conditioning([0]),
            tuple(teacher.latent_shape),
            teacher.shift,
            digests,
            PromptSet(prompts / "eval"),
            reference,
            store,
        )


def open_pairs(folder: Path, teacher: TeacherManifest, prompts_sha256: str) -> Store:
    """The pairs that the stage `latents` has written; CdmError if they are missing, damaged or of something else."""
    pairs = Store(folder)
    pairs.verify()
    if (pairs.metadata.get("teacher"), pairs.metadata.get("prompts_sha256")) != (
        teacher.digest,
        prompts_sha256,
    ):
        raise CdmError(f"{folder}: drawn for another teacher or other prompts: run the stage `latents` again")
    return pairs


def fingerprint(params: Params, inputs: Inputs) -> str:
    """Names an experiment: equal for runs that would give the same student, so that one resumes another."""
    sections = params.model_dump(mode="json", include=SHAPING)
    code = code_digest("distill", inputs.family.name)
    return digest_of([sections, inputs.digests, code, torch.__version__])[:16]


@dataclass
class Run:
    """What a checkpoint holds: two learners, the moving average of the student, and the rows of the log.

    `best` is the moving average of the best probe, or empty where none is to be kept.
    """

    networks: Networks
    student: Learner
    fake: Learner
    average: dict[str, Tensor]
    rows: list[dict[str, float]]
    iteration: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, networks: Networks, params: Params) -> Run:
        distill = params.distill
        student_updates = (distill.iterations - distill.fake_only) // distill.student_every
        student = Learner(networks.parameters("student"), distill.student, student_updates)
        fake = Learner(networks.parameters("fake"), distill.fake, distill.iterations)
        average = {name: value.detach().clone() for name, value in student.parameters.items()}
        return cls(networks, student, fake, average, [])

    def update_average(self, decay: float) -> None:
        share = 1 - ema_decay(decay, self.student.updates_done - 1)
        blend(self.average.values(), self.student.parameters.values(), share)

    def note(self, figures: Figures, keep: str) -> None:
        """Enters a probe of the moving average into the newest row of the log, and keeps the best if wanted."""
        before = min((row["probe"] for row in self.rows if "probe" in row), default=math.inf)
        self.rows[-1] |= figures
        if keep == "best" and figures["probe"] < before:
            self.best = {name: value.clone() for name, value in self.average.items()}

    def choose_best(self) -> None:
        """Makes the moving average that of the best probe, if one was kept."""
        for name, value in self.best.items():
            self.average[name].copy_(value)

    def losses(self) -> str:
        """The newest losses, for the progress bar."""
        newest = self.rows[-1] if self.rows else {}
        return " ".join(f"{name[5:]} {value:.3f}" for name, value in newest.items() if name.startswith("loss_"))

    def checkpoint(self, keep: bool = True) -> Checkpoint:
        """The state in whole tensors, whoever holds them: all processes make it, those that `keep` it have it."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.parameters,
            "fake": self.fake.parameters,
            "average": self.average,
            "student_optimiser": self.student.state(),
            "fake_optimiser": self.fake.state(),
        }
        if self.best:
            groups["best"] = self.best
        tensors = {name: sharding.gather(group, keep) for name, group in groups.items()}
        updates = {"student": self.student.updates_done, "fake": self.fake.updates_done}
        return Checkpoint(self.iteration, tensors, {"rows": self.rows, "updates": updates})

    def restore(self, saved: Checkpoint) -> None:
        if "best" in saved.tensors:
            self.best = {name: torch.empty_like(value) for name, value in self.average.items()}
        groups: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.parameters,
            "fake": self.fake.parameters,
            "average": self.average,
            "best": self.best,
        }
        for name, into in groups.items():
            for key, value in into.items():
                sharding.assign(value, saved.tensors[name][key])
        updates = saved.state["updates"]
        self.student.load_state(saved.tensors.get("student_optimiser", {}), updates["student"])
        self.fake.load_state(saved.tensors.get("fake_optimiser", {}), updates["fake"])
        self.iteration, self.rows = saved.step, saved.state["rows"]


class StopRequest:
    """Remembers SIGINT or SIGTERM until a round is over; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def distill(
    params: Params, inputs: Inputs, *, checkpoints: Path, student: Path, log: Path, places: Places | None = None
) -> None:
    """Distils the student of `params` into the folder `student` and its log, a row a round, into `log`.

    `places` are for those who watch; without them there are no pictures, no times and no tracker. Takes up the
    newest checkpoint of the same experiment under `checkpoints`, and removes them when done. After SIGINT or SIGTERM
    it saves and exits with 128 + signal. Raises CdmError if the experiment is running already, the batch does not
    divide over the processes, or a loss is no longer finite.
    """
    name = f"distill-{fingerprint(params, inputs)}"
    folder = checkpoints / name
    accelerator = Accelerator(
        cpu=choose_device(params.runtime.device).type == "cpu",
        log_with=params.runtime.tracker if places is not None else None,
        project_dir=places.trackers / name if places is not None else None,
    )
    run, distiller = prepare(params, inputs, accelerator)
    with checkpoint.locked(folder, accelerator.is_main_process), StopRequest().listening() as stop:
        saved = checkpoint.load_newest(folder)
        if saved is not None:
            run.restore(saved)
            accelerator.print(f"resuming at iteration {run.iteration} of {params.distill.iterations}")
        probe = open_probe(params, inputs, distiller, accelerator)
        watch = open_watch(params, inputs, distiller, accelerator, places, folder)
        with watch.running(run.iteration):
            train(run, distiller, params, stop, accelerator, folder, probe, watch)
        run.choose_best()
        average = sharding.gather(run.average, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            write_log(run.rows, log)
            save_student(run.networks, average, inputs, params, student)
            checkpoint.remove(folder)
        accelerator.wait_for_everyone()


def prepare(params: Params, inputs: Inputs, accelerator: Accelerator) -> tuple[Run, Distiller]:
    """The networks on their device, and the training step of this process's share of the batch."""
    distill, device = params.distill, accelerator.device
    share, rest = divmod(distill.batch_size, accelerator.num_processes)
    if rest:
        raise CdmError(
            f"distill.batch_size {distill.batch_size} does not divide over {accelerator.num_processes} processes"
        )
    run = Run.start(build_networks(params, inputs, device), params)
    first = accelerator.process_index * share
    distiller = Distiller(
        run.networks,
        run.student,
        run.fake,
        distill=distill,
        schedule=params.schedule,
        shift=inputs.shift,
        seed=params.seed,
        prompts=prompt_source(params, inputs, device),
        empty={name: value.to(device) for name, value in inputs.empty.items()},
        latent_shape=inputs.latent_shape,
        samples=range(first, first + share),
        pairs=pair_source(inputs, device),
        micro_batch=params.runtime.micro_batch,
        device=device,
        most=partial(largest, accelerator=accelerator) if sharding.is_wanted() else int,
    )
    return run, distiller


def build_networks(params: Params, inputs: Inputs, device: torch.device) -> Networks:
    """The three roles, all of them the teacher, on the device or spread over those of all processes."""
    distill = params.distill
    teacher = inputs.family.load_transformer(inputs.source)
    autocast = torch.bfloat16 if distill.precision == "bf16" else None
    checkpointing = distill.gradient_checkpointing

    # What differentiates a network in its inputs, which torch's sharding knows nothing of.
    inner = {"sgmd"} if distill.losses.consistency.step else {"sgmd", "consistency"}
    for name in sorted(inner & set(distill.losses.weights)):
        if sharding.is_wanted():
            raise CdmError(f"distill.losses.{name} does not work sharded: give it weight 0, or use plain DDP")

    def place(model: nn.Module) -> nn.Module:
        return sharding.shard(model, device, autocast) if sharding.is_wanted() else model.to(device)

    if distill.lora is None:
        networks: Networks = FullNetworks(
            inputs.family, teacher, autocast=autocast, gradient_checkpointing=checkpointing, place=place
        )
        if distill.fake_knows_level:
            if sharding.is_wanted():
                raise CdmError(
                    "distill.fake_knows_level does not work sharded: set it to false, or use plain DDP"
                )
            networks = LevelAwareFake(networks, inputs.family, inputs.empty, device)
        return networks
    return LoraNetworks(
        inputs.family,
        teacher,
        distill.lora,
        seed=params.seed,
        autocast=autocast,
        gradient_checkpointing=checkpointing,
        place=place,
    )


def prompt_source(
    params: Params, inputs: Inputs, device: torch.device
) -> Callable[[int, Sequence[int]], Conditioning]:
    """The conditioning of an iteration's samples: every prompt once an epoch, in an order of its own."""
    prompts, batch = inputs.prompts, params.distill.batch_size

    def conditioning(iteration: int, samples: Sequence[int]) -> Conditioning:
        positions = [iteration * batch + sample for sample in samples]
        return prompts.conditioning(prompt_indices(params.seed, positions, len(prompts)), device)

    return conditioning


def pair_source(inputs: Inputs, device: torch.device) -> Callable[[Draws], Pairs] | None:
    """Pairs for an iteration's samples, each drawn anew from all that there are."""
    if inputs.pairs is None:
        return None
    store, prompts = inputs.pairs, inputs.prompts

    def pairs(draws: Draws) -> Pairs:
        rows = store.rows(draws.integers("pair", len(store)))
        conditioning = prompts.conditioning(rows["prompt"].tolist(), device)
        return Pairs(rows["noise"].to(device), rows["latents"].to(device), conditioning)

    return pairs


def open_probe(
    params: Params, inputs: Inputs, distiller: Distiller, accelerator: Accelerator
) -> QualityProbe | None:
    """The probe that `distill.probe` asks for; it draws as many samples at once as training does."""
    if inputs.reference is None:
        return None
    return QualityProbe(
        params.distill.probe,
        inputs.reference,
        distiller.networks,
        seed=params.seed,
        shift=inputs.shift,
        latent_shape=inputs.latent_shape,
        batch=len(distiller.parts[0]),
        accelerator=accelerator,
    )


def train(
    run: Run,
    distiller: Distiller,
    params: Params,
    stop: StopRequest,
    accelerator: Accelerator,
    folder: Path,
    probe: QualityProbe | None,
    watch: Watch,
) -> None:
    """Rounds until the last iteration, or until somebody wants to stop: then SystemExit, after saving."""
    iterations, every = params.distill.iterations, params.distill.student_every
    rounds: Iterable[int] = range(run.iteration, iterations, every)
    if accelerator.is_main_process:
        rounds = track(rounds, "distill", unit="round", detail=run.losses)
    for iteration in rounds:
        with watch.round():
            metrics = over_processes(distiller.round(iteration), accelerator)
        check_finite(metrics, iteration)
        if iteration >= params.distill.fake_only:
            run.update_average(params.distill.ema)
        run.iteration = iteration + every
        run.rows.append({"iteration": run.iteration, **metrics})
        if probe is not None and falls_due(probe.settings.every, iteration, run.iteration, iterations):
            run.note(probe.measure(run.student.parameters, run.average), params.distill.keep)
        watch.after_round(run.rows, run.student.parameters, run.average)
        # A signal that any process has received: all save the same step.
        wanted = largest(stop.signal, accelerator)
        between = params.runtime.checkpoint_every
        due = wanted or run.iteration // between > iteration // between
        if due and run.iteration < iterations:
            state = run.checkpoint(keep=accelerator.is_main_process)
            if accelerator.is_main_process:
                checkpoint.save(folder, state)
            accelerator.wait_for_everyone()
            if wanted:
                accelerator.print(f"stopped and saved at iteration {run.iteration}: the same command resumes")
                raise SystemExit(128 + wanted)


def over_processes(metrics: Metrics, accelerator: Accelerator) -> Metrics:
    """The mean of each figure over the processes."""
    if accelerator.num_processes == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / accelerator.num_processes).tolist(), strict=True))


def largest(value: int, accelerator: Accelerator) -> int:
    """The largest of a number over the processes."""
    if accelerator.num_processes == 1:
        return value
    most = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def check_finite(metrics: Metrics, iteration: int) -> None:
    """CdmError naming the figures that are not finite."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise CdmError(
            f"training diverged: {', '.join(broken)} not finite in the round at iteration {iteration}; the last"
            " checkpoint is kept. Lower distill.student.lr or distill.fake.lr, or the scale of the term named"
        )


def write_log(rows: list[dict[str, Any]], path: Path) -> None:
    """The log as CSV; a round without a student update leaves its cells empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_student(
    networks: Networks, average: dict[str, Tensor], inputs: Inputs, params: Params, folder: Path
) -> None:
    """The moving average of the student, with the record of what it was made from: a pipeline folder of the teacher's
    kind, or a LoRA for the teacher."""
    (folder / LORA).unlink(missing_ok=True)
    networks.save_student(average, inputs.source, folder)
    record = LORA if isinstance(networks, LoraNetworks) else FULL
    Origin.of(inputs.teacher, params).write(folder / record)
