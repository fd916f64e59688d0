"""The boundary of all commands: what goes wrong and can be mended is told in lines, never by a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from cdm.errors import line
from cdm.system.files import arguments_at_home
from cdm.system.problems import explained

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal."""


def tell(message: str, who: str = "") -> None:
    """Each line of a message on standard error, behind `error: ` and the name of the process that says it."""
    for each in message.splitlines():
        print(f"error: {who}{each}", file=sys.stderr)


def program(main: Callable[..., None]) -> typer.Typer:
    """A function as a command: its signature makes the options."""
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    made.command()(main)
    return made


def run(app: Callable[..., Any], tell: Callable[[str], None] = tell) -> None:
    """Runs a typer program with the arguments of this process, in which `~` is the home folder.

    What the user can mend goes to `tell`, one line a problem; the exit code is then 1, or 2 for arguments that are
    none. An error of the program itself is raised: its traceback says where.
    """
    sys.argv[1:] = arguments_at_home(sys.argv[1:])
    with suppress(AttributeError, OSError, ValueError):  # not an ordinary stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        message, code = _message(error)
        if message is None:
            raise
        tell(message)
    sys.exit(code or 0)


def _message(error: Exception) -> tuple[str | None, int]:
    """What to tell, and the exit code; None for an error of the program itself."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, typer.Abort):  # of an EOFError, typer thinks that the user ended the input
        cause = explained(error.__cause__) if error.__cause__ is not None else None
        return (cause, 1) if cause else ("", INTERRUPTED)
    if (
        "ClickException" in kinds
    ):  # click's, or of typer's own copy of it: that changes with the version of typer
        return _usage(error, shows_help="NoArgsIsHelpError" in kinds), 2
    if isinstance(error, OSError) and error.filename is None and not _can_print():
        # Whoever reads the output has enough of it: nothing is wrong.
        return "" if error.errno == errno.EPIPE else f"standard output: {explained(error)}", 1
    return explained(error), 1


def _usage(error: Any, shows_help: bool) -> str:
    """What is wrong with the arguments, in a line; empty where the help of the command is shown instead."""
    if shows_help:
        error.show()
        return ""
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f" (see `{context.command_path} --help`)"
    return line(error.format_message()).rstrip(".") + hint


def _can_print() -> bool:
    """Whether standard output takes more. Where it does not, nothing is written there from now on."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
