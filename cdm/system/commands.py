"""Commands as people write them: environment variables before and in them, `~`, and the files that they consist of."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cdm.errors import CdmError
from cdm.system.files import digest_of

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
SCRIPT = b"#!"
"""What a program starts with that another one interprets."""


@dataclass(frozen=True)
class Command:
    """A command to be started without a shell."""

    arguments: list[str]
    """The program and its arguments."""
    environment: dict[str, str]
    """Variables that are set for it alone."""
    written: list[str]
    """Assignments, program and arguments as they were written, before `~` and variables were filled in."""

    @classmethod
    def parse(cls, text: str) -> Command:
        """The command `[NAME=VALUE ...] PROGRAM [ARGUMENT ...]`, quoted as in a shell.

        `$NAME`, `${NAME}` and a `~` at the start of a word or behind its `=` are filled in; nothing else of a shell is
        there. Raises CdmError for a quotation without an end, a variable that is not set, and a missing program.
        """
        try:
            written = shlex.split(text)
        except ValueError as error:
            raise CdmError(f"{text}: {error}") from None
        words = [_filled(word) for word in written]
        count = next((i for i, word in enumerate(written) if not ASSIGNMENT.match(word)), len(written))
        if count == len(words):
            raise CdmError(f"{text}: names no program")
        environment = dict(word.split("=", 1) for word in words[:count])
        return cls(words[count:], environment, written)

    @property
    def program(self) -> Path | None:
        """The file of the program; None where there is none."""
        path = self.environment.get("PATH")
        found = shutil.which(self.arguments[0], path=path)
        return None if found is None else Path(found)

    def missing_scripts(self) -> list[str]:
        """Arguments that name a Python script which is not there."""
        return [word for word in self.arguments[1:] if word.endswith(".py") and not _is_file(Path(word))]

    def files(self) -> dict[str, Path]:
        """The files that the command consists of, by their names in it: what it does may change with each of them.

        These are its program where that is a script or lies in this folder, every argument and every value of an option
        or variable that is a file, the module behind `-m` if it lies in this folder, and what Python scripts among them
        import from their own folders. What a script reads besides is not known.
        """
        found = {name: path for name, path in self._named() if _is_file(path)}
        for name, path in list(found.items()):
            if path.suffix == ".py":
                prefix = name[: -len(path.name)]
                found |= {f"{prefix}{other.name}": other for other in _imported(path)}
        return dict(sorted(found.items()))

    def hashes(self, of_file: Callable[[Path], str]) -> dict[str, str]:
        """SHA-256 of what the command consists of: of its `files` by name, as `of_file` gives it, and of the values of
        variables that are filled in, by `$NAME`. A value that is a path only says where something is."""
        values = {f"${name}": os.environ[name] for word in self.written for name in _variables(word)}
        files = {name: of_file(path) for name, path in self.files().items()}
        return files | {name: digest_of(value) for name, value in sorted(values.items()) if "/" not in value}

    def _named(self) -> Iterator[tuple[str, Path]]:
        names = self.written[-len(self.arguments) :]
        program = self.program
        if program is not None and (_is_inside(self.arguments[0]) or _is_script(program)):
            yield names[0], program
        for i, (name, word) in enumerate(zip(names, self.arguments, strict=True)):
            if i > 0:
                yield name, Path(word)
                yield name.partition("=")[2], Path(word.partition("=")[2])
            if self.arguments[i - 1 : i] == ["-m"]:
                module = Path(*word.split("."))
                for path in (module.with_suffix(".py"), module / "__main__.py"):
                    yield path.as_posix(), path
        for name in self.written[: -len(self.arguments)]:
            key, _, value = name.partition("=")
            yield value, Path(self.environment[key])


def _filled(word: str) -> str:
    """A word with the variables and the `~` in it filled in; CdmError for a variable that is not set."""
    for name in _variables(word):
        if name not in os.environ:
            raise CdmError(f"{word}: the environment variable {name} is not set")
    name, separator, rest = word.partition("=")
    if separator and rest.startswith("~"):
        word = f"{name}={_at_home(rest)}"
    return VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], _at_home(word))


def _variables(word: str) -> list[str]:
    return [plain or braced for plain, braced in VARIABLE.findall(word)]


def _at_home(word: str) -> str:
    return os.path.expanduser(word)  # noqa: PTH111 - not every word is a path, and a path would be tidied up


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name, say
        return False


def _is_inside(program: str) -> bool:
    return "/" in program and not Path(program).is_absolute()


def _is_script(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SCRIPT)) == SCRIPT
    except OSError:
        return False


def _imported(script: Path) -> set[Path]:
    """Python files in the folder of `script` that it imports, or that these import; it is among them."""
    found, new = set[Path](), {script}
    while new:
        found |= new
        names = {name.partition(".")[0] for path in new for name in _imports(path)}
        new = {path for name in names if _is_file(path := script.with_name(f"{name}.py"))} - found
    return found


def _imports(path: Path) -> Iterator[str]:
    """Names of the modules that a Python file imports; none where it cannot be read as Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
