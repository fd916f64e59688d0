"""Running a command in several processes, on this machine and others, by accelerate's launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cdm.errors import CdmError

LAUNCHED = "CDM_LAUNCHED"
"""Set in the environment of the processes that `launch` has started."""

SIGNALLED = 128
"""What a shell adds to the number of the signal that has ended a process."""


def launch(module: str, config: str | None) -> None:
    """Runs `python -m module`, with this command's arguments, in the processes of a config file of accelerate.

    Ends with the exit code of the first process that failed, or 0. Returns where there is nothing to launch: no
    config, or this is one of the processes, whoever has started them. SIGINT and SIGTERM are passed on; the
    processes then have 30 seconds. Raises CdmError if the file cannot be used.

    A command that calls this stays the same however it is run, so that DVC has no reason to run it again.
    """
    if config is None or LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return
    if not Path(config).is_file():
        raise CdmError(f"runtime.accelerate_config: {config}: no such file")
    os.environ[LAUNCHED] = config
    sys.exit(_run(["--config_file", config, "--module", module, *sys.argv[1:]]))


def _run(arguments: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:  # of a config for a single process
        return _exit_code(error.returncode)
    except SignalException as stopped:
        return SIGNALLED + stopped.sigval
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CdmError(f"{arguments[1]}: accelerate cannot start it: {' '.join(str(error).split())}") from None
    return 0


def _exit_code(code: int) -> int:
    return SIGNALLED - code if code < 0 else code
