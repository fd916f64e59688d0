"""The loop around the training step: rounds, moving average, log, checkpoints, stopping, the saved student."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator

from cdm.params import Params
from cdm.system.problems import naming
from cdm.system.processes import join
from cdm.system.progress import track
from cdm.system.signals import StopRequest
from cdm.training import checkpoint, sharding
from cdm.training.distiller import Distiller, Metrics
from cdm.training.identity import fingerprint
from cdm.training.inputs import Inputs
from cdm.training.probe import QualityProbe, falls_due
from cdm.training.saver import Saver
from cdm.training.saving import check_place, save_student, write_log
from cdm.training.setup import largest, open_probe, prepare
from cdm.training.state import TrainingState
from cdm.training.watch import Places, Watch, open_watch

FAILED = 1000
"""Above all signals: that a checkpoint could not be written."""


def distill(
    params: Params, inputs: Inputs, *, checkpoints: Path, student: Path, log: Path, places: Places | None = None
) -> None:
    """Distils the student of `params` into the folder `student` and its log, a row a round, into `log`.

    `places` are the paths of pictures, times and tracker files; without them none is written. Takes up the
    newest checkpoint of the same experiment under `checkpoints`. The last one stays there when it is done, so that the
    student can be written again in no time if it is lost (`checkpoint.give_back` deletes it). After SIGINT or SIGTERM
    it saves and exits with 128 + signal. Raises CdmError if the folder `student` holds other things, the experiment is
    running already, the batch does not divide over the processes, or a loss is no longer finite.
    """
    check_place(student)
    name = f"distill-{fingerprint(params, inputs)}"
    folder = checkpoints / name
    timeout = timedelta(hours=params.runtime.timeout_hours)
    device = join(params.runtime.device, timeout).device
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        log_with=params.runtime.tracker if places is not None else None,
        project_dir=places.trackers / name if places is not None else None,
    )
    state, distiller = prepare(params, inputs, accelerator)
    with (
        checkpoint.locked(folder, accelerator.is_main_process),
        StopRequest().listening() as stop,
        Saver(folder, accelerator, timeout) as saver,
    ):
        saved = saver.newest()
        if saved is not None:
            state.restore(saved)
            accelerator.print(f"resuming at iteration {state.iteration} of {params.distill.iterations}")
        probe = open_probe(params, inputs, distiller, accelerator)
        watch = open_watch(params, inputs, distiller, accelerator, places, folder)
        with watch.running(state.iteration):
            train(state, distiller, params, stop, accelerator, saver, probe, watch)
        state.choose_best()
        if accelerator.is_main_process:
            with naming(log):
                write_log(state.rows, log)
            with naming(student):
                save_student(state.networks, state.average, inputs, params, student, name)
        else:
            sharding.lend(state.average)
        accelerator.wait_for_everyone()


def train(
    state: TrainingState,
    distiller: Distiller,
    params: Params,
    stop: StopRequest,
    accelerator: Accelerator,
    saver: Saver,
    probe: QualityProbe | None,
    watch: Watch,
) -> None:
    """Runs rounds until the last iteration, and saves a checkpoint there. On a request to stop it saves one and raises
    SystemExit."""
    distill, between = params.distill, params.runtime.checkpoint_every
    iterations = distill.iterations
    rounds: Iterable[int] = range(state.iteration, iterations, distill.student_every)
    if accelerator.is_main_process:
        rounds = track(rounds, "distill", unit="round", detail=state.losses)
    for iteration in rounds:
        with watch.round():
            metrics = over_processes(distiller.round(iteration), accelerator)
        state.after_round(metrics, iteration, distill)
        if probe is not None and falls_due(probe.settings.every, iteration, state.iteration, iterations):
            figures = probe.measure(state.student.parameters, state.average)
            state.note(figures, distill.keep, distill.probe.best_column)
        watch.after_round(state.rows, state.student.parameters, state.average)
        # A signal that any process has received: all save the same step.
        wanted = largest(FAILED if saver.failed else stop.signal, accelerator)
        if wanted == FAILED:
            saver.stop()
        done = state.iteration >= iterations
        if done or wanted or state.iteration // between > iteration // between:
            saver.save(state.checkpoint())
        if done or wanted:
            saver.wait()
        if wanted and not done:
            accelerator.print(f"stopped and saved at iteration {state.iteration}: the same command resumes")
            raise SystemExit(128 + wanted)


def over_processes(metrics: Metrics, accelerator: Accelerator) -> Metrics:
    """The mean of each figure over the processes."""
    if accelerator.num_processes == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / accelerator.num_processes).tolist(), strict=True))
