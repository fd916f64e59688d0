"""Running a command in several processes, on this machine and others, by accelerate's launcher."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from cdm.errors import CdmError
from cdm.system.parent import GRACE, SHUTDOWN

LAUNCHED = "CDM_LAUNCHED"
"""Set in the environment of the processes that `launch` has started: a folder that those of this machine share."""
ELASTIC = "TORCHELASTIC_ERROR_FILE"
"""Where another launcher of torch's kind has started them, a file that lies in such a folder, in one of its own."""

SAID, LOST = "said", "lost"
"""Files there: that a process has said what went wrong, and what one says that misses another."""
BROKEN = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe")
"""What errors of torch say where a process of the group has gone."""

SIGNALLED = 128
"""What a shell adds to the number of the signal that has ended a process."""


def launch(module: str, config: str | None) -> None:
    """Runs `python -m module`, with this command's arguments, in the processes of a config file of accelerate.

    Ends with the exit code of the first process that failed, or 0. Returns where there is nothing to launch: no
    config, or this is one of the processes, whoever has started them. SIGINT and SIGTERM are passed on; the
    processes then have the seconds of `parent.grace`. Raises CdmError if the file cannot be used.

    A command that calls this stays the same however it is run, so that DVC has no reason to run it again.
    """
    if config is None or is_launched():
        return
    if not Path(config).is_file():
        raise CdmError(f"runtime.accelerate_config: {config}: no such file")
    with tempfile.TemporaryDirectory(prefix="cdm-") as shared:
        os.environ[LAUNCHED] = shared
        os.environ.setdefault(SHUTDOWN, str(GRACE))
        sys.exit(_run(["--config_file", config, "--module", module, *sys.argv[1:]]))


def is_launched() -> bool:
    """Whether a launcher has started this process, as one of several."""
    return LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def rank() -> str:
    """The number of this process among all that were launched together; empty where it is alone."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "")


def shared_device(device: str) -> str | None:
    """What is wrong with `runtime.device` where there are several processes: that it names one device for all."""
    if ":" not in device:
        return None
    kind = device.partition(":")[0]
    return (
        f"runtime.device: {device} is one device, and each of several processes needs its own: set it to {kind}"
    )


def speaks_for_all() -> bool:
    """Whether this process is the first of those launched on this machine that asks: the one to say what went wrong.

    An error of one process makes others fail, later. True where there is no launcher, or one that shares nothing.
    """
    shared = _shared()
    if shared is None:
        return True
    try:
        (shared / SAID).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder has gone with the launcher: better twice than never
        pass
    return True


def lost_others(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended, or cannot be reached; noted for the launcher,
    which knows whether one was killed. False where no `launch` has started this process."""
    text = " ".join(str(error).split())
    if LAUNCHED not in os.environ or not isinstance(error, RuntimeError) or not BROKEN.search(text):
        return False
    said = f"rank {rank()}: another process cannot be reached: {text}"
    with suppress(OSError):
        (Path(os.environ[LAUNCHED]) / LOST).write_text(said)
    return True


def _shared() -> Path | None:
    """A folder that the processes of this machine share, and no others."""
    if LAUNCHED in os.environ:
        return Path(os.environ[LAUNCHED])
    return Path(os.environ[ELASTIC]).parents[1] if os.environ.get(ELASTIC) else None


def _run(arguments: list[str]) -> int:
    import torch.distributed.run  # noqa: F401 - for its loggers: accelerate imports it later
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # they show tables of failures: the processes say what it was
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        _say_what_nobody_said(codes)
        return _exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:  # of a config for a single process
        return _exit_code(error.returncode)
    except SignalException as stopped:
        return SIGNALLED + stopped.sigval
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CdmError(f"{arguments[1]}: accelerate cannot start it: {' '.join(str(error).split())}") from None
    return 0


def _say_what_nobody_said(codes: dict[int, int]) -> None:
    """Names the process that a signal has ended, such as where memory is out, or says that one is lost; unless a
    process has said what went wrong. `codes` are exit codes by rank; the launcher ends by SIGTERM those that are left.
    """
    killed = [(rank, -code) for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    lost = Path(os.environ[LAUNCHED]) / LOST
    if not (killed or lost.exists()) or not speaks_for_all():
        return
    if not killed:
        print(f"error: {lost.read_text()}", file=sys.stderr)
        return
    rank, number = killed[0]
    print(f"error: rank {rank}: ended by {_name(number)}, and so were the others", file=sys.stderr)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _exit_code(code: int) -> int:
    return SIGNALLED - code if code < 0 else code
