"""The checkpoints of a training as its processes write them together: sharded ones while it goes on.

Each process copies its slices into main memory, where they stay until they are written, and goes on. A thread writes
them, in parallel with the other processes.
"""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from cdm.errors import CdmError
from cdm.system.problems import naming
from cdm.training import checkpoint
from cdm.training.checkpoint import Checkpoint, Saved
from cdm.training.setup import largest
from cdm.training.sharding import is_sharded, slice_of


class Saver:
    """Saves checkpoints in `folder`, one after the other; all processes must save the same ones.

    At its end it waits for the last. Processes wait for one another as long as `timeout`.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, timeout: timedelta) -> None:
        self.folder, self.accelerator, self.timeout = folder, accelerator, timeout
        self._processes: torch.distributed.ProcessGroup | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt) and self._thread is not None:
            self._thread.join()  # the error that has come is the one to tell

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, as far as is known: `wait` tells why."""
        return self._error is not None

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, the same in all processes, each of which looks at some of its files."""
        most = partial(largest, accelerator=self.accelerator)
        return checkpoint.load_newest(
            self.folder, self.accelerator.process_index, self.accelerator.num_processes, most
        )

    def save(self, state: Checkpoint) -> None:
        """Saves a checkpoint, after the one before. Where its tensors are sharded, it may be written later.

        Raises what went wrong with either.
        """
        self.wait()
        if any(is_sharded(value) for group in state.tensors.values() for value in group.values()):
            self._stage(state)
            return
        if self.accelerator.is_main_process:
            with naming(self.folder):
                checkpoint.save(self.folder, state)
        self.accelerator.wait_for_everyone()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk of all processes. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            with naming(self.folder):
                raise error

    def stop(self) -> None:
        """Raises what went wrong in any process; to be called by all if one has `failed`."""
        self.wait()
        raise CdmError(f"{self.folder}: another process could not write its part of a checkpoint")

    def _stage(self, state: Checkpoint) -> None:
        """Copies what this process holds, and starts to write it."""
        from cdm.training.slices import key_of, write_slices

        if self._processes is None:  # not that of the training, whose messages must not come between
            self._processes = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        groups = {
            group: {name: tensor.detach() for name, tensor in tensors.items()}
            for group, tensors in state.tensors.items()
        }
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                key, held = key_of(group, name), slice_of(tensor)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty_like(held, device="cpu")
                self._buffers[key].copy_(held)
        write = partial(
            write_slices,
            checkpoint.partial_path(self.folder, state.step),
            groups,
            self._buffers,
            self._processes,
            partial(checkpoint.begin, self.folder, state.step),
            partial(checkpoint.commit, self.folder, state.step, state=json.dumps(state.state)),
        )
        self._thread = Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, write: Any) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - torch's own is no Exception; `wait` raises it
            self._error = error
