"""The commands that pages, params files and messages name, and whether the programs that they name would take them.

A page's commands are the lines of its `bash` blocks, whole, and what it names in backticks, which may be the beginning
of one. `check` asks the real interfaces: typer's for `cdm` and the modules of the repository, DVC's own parser and the
params file for `-S`, the Makefile's targets. Whatever is started by a program that it does not know is an error too, so
that a new kind of line has to be decided here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from ruamel.yaml import YAML

from cdm.errors import CdmError
from cdm.params import Params, load

ROOT = Path(__file__).parent.parent
PAGES = [
    *[path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()],
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "comparison/README.md",
    ROOT / "miniature/README.md",
]
BLOCKS = {"bash", "json", "python", "text", "yaml"}
"""Languages of a page's blocks: `bash` holds commands and nothing else, `text` what programs print."""


class UnknownCommandError(Exception):
    """A command that would not work, or that nothing here knows how to check."""


@dataclass(frozen=True)
class Command:
    """A command line, or the beginning of one in backticks, and where it stands."""

    path: Path
    line: int
    text: str
    whole: bool
    """Whether it can be run as it stands; else arguments may be missing at its end."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """The number of the first line, the language and the text of each block of a page."""
    for found in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?) *```$", text, re.MULTILINE):
        yield (
            text.count("\n", 0, found.start()) + 2,
            found[2].strip(),
            re.sub(rf"(?m)^{found[1]}", "", found[3]),
        )


def without_blocks(text: str) -> str:
    """A page with its blocks left empty, lines counted as before."""
    return re.sub(
        r"^ *```.*\n(?:.*\n)*? *```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE
    )


def lines_of(path: Path, section: str = "") -> Iterator[Command]:
    """The command lines of a page's blocks, or of those below one heading."""
    page = path.read_text()
    for first, language, text in blocks(page):
        above = page.splitlines()[:first]
        heading = next((line for line in reversed(above) if line.startswith("## ")), "")
        if language == "bash" and section in ("", heading.removeprefix("## ")):
            joined = text.replace("\\\n", "  ")  # a line that goes on
            number = first
            for line in joined.splitlines():
                if command := without_comment(line).strip():
                    yield Command(path, number, command, whole=True)
                number += 1


def mentions(path: Path) -> Iterator[Command]:
    """What a page, a params file or a module names in backticks and begins as a command does."""
    text = path.read_text()
    if path.suffix == ".md":
        text = without_blocks(text)
    for found in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        words = found[1].split()
        if path.suffix != ".md":
            words = [word for word in words if word not in {"#", '"', "'"}]  # a comment that goes on
        if words[:1] == ["-S"]:
            words = ["dvc", "exp", "run", *words]
        if len(words) > 1 and words[0] in CHECKS and "module" not in words:
            yield Command(path, text.count("\n", 0, found.start()) + 1, " ".join(words), whole=False)


def makefile_messages() -> Iterator[Command]:
    """What the Makefile tells its user to run, and what it runs itself of DVC and this repository."""
    path = ROOT / "Makefile"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for text in re.findall(r"'([^']*)'", line):
            for command in re.findall(r"(?:^ +|: |\(|, )((?:dvc|cdm|make|git) [^,()]+)", text):
                yield Command(path, number, command.strip(), whole=True)
        if found := re.fullmatch(r"\t@?((?:dvc|cdm) .*)", line):
            yield Command(path, number, found[1], whole=True)


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#(\s.*)?$", "", line)


def parts(command: Command) -> Iterator[list[str]]:
    """The words of each program that a line starts, without the variables that it sets for it."""
    words = shlex.shlex(command.text, posix=True, punctuation_chars="&|;<>")
    words.whitespace_split = True
    words.commenters = ""
    part: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("&|;"):
            while part and re.match(r"[A-Z_]+=", part[0]):
                part.pop(0)
            if part:
                yield part
            part = []
        else:
            part.append(word)


def check(command: Command) -> None:
    """Raises UnknownCommandError if the line would not be taken."""
    for head, *words in parts(command):
        if "/" in head and (ROOT / head).is_file():
            continue  # a script of the repository
        if head not in CHECKS:
            raise UnknownCommandError(f"{head}: no program that tests/documented.py knows how to check")
        CHECKS[head](words, command.whole)


def is_placeholder(word: str) -> bool:
    """NAME, FOLDER, FILE.safetensors: something for the reader to fill in."""
    return re.fullmatch(r"[A-Z][A-Z_-]*(\..*)?", word) is not None


# What takes a line of a typer program.


def check_typer(name: str, program: Any, words: Sequence[str], whole: bool) -> None:
    command, rest, parent = program, list(words), None
    while True:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                context = command.make_context(name, rest, parent=parent)
        except typer.Exit:
            return  # --help, --version
        except Exception as error:  # noqa: BLE001 - click's errors, or those of typer's own copy of it
            if whole or type(error).__name__ not in {"MissingParameter", "NoArgsIsHelpError"}:
                raise UnknownCommandError(f"{name}: {error}") from None
            return
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        try:
            name, command, rest = command.resolve_command(context, rest)
        except Exception as error:  # noqa: BLE001 - as above
            raise UnknownCommandError(f"{name}: {error}") from None
        parent = context


def check_cdm(words: list[str], whole: bool) -> None:
    from cdm.cli import app

    check_typer("cdm", typer.main.get_command(app), words, whole)
    if words[:2] == ["recipe", "use"] and len(words) > 2:
        name = words[2]
        if not is_placeholder(name) and not (ROOT / f"recipes/{name}.yaml").exists():
            raise UnknownCommandError(f"there is no recipe {name}")


def check_python(words: list[str], whole: bool) -> None:
    if words[0] == "-m":
        module = words[1]
        if module.startswith("stages.") and is_placeholder(module.removeprefix("stages.")):
            return
        path = ROOT / module.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.exists():
            raise UnknownCommandError(f"there is no module {module}")
        if "import typer" in path.read_text() or module.startswith("stages."):
            main = importlib.import_module(f"{module}.__main__" if path.stem == "__main__" else module).main
            app = typer.Typer()
            app.command()(main)
            check_typer(module, typer.main.get_command(app), words[2:], whole)
        elif len(words) > 2 and "sys.argv" not in path.read_text():
            raise UnknownCommandError(f"{module} takes no arguments")
    elif not (ROOT / words[0]).is_file():
        raise UnknownCommandError(f"there is no script {words[0]}")


# DVC.


@cache
def dvc_parser() -> Any:
    from dvc.cli.parser import get_main_parser

    return get_main_parser()


@cache
def committed_params() -> Params:
    return load(ROOT / "params.yaml")


def check_dvc(words: list[str], whole: bool) -> None:
    from dvc.cli import DvcParserError

    problems = logging.StreamHandler(io.StringIO())
    logging.getLogger("dvc").addHandler(problems)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments = dvc_parser().parse_args(words)
        except DvcParserError:
            problem = problems.stream.getvalue().strip()
            if not whole and re.search("arguments are required|expected (one|at least one) argument", problem):
                return
            raise UnknownCommandError(f"dvc: {problem}") from None
        finally:
            logging.getLogger("dvc").removeHandler(problems)
    folder = ROOT / arguments.cd
    function = arguments.func.__name__
    if function in {"CmdRepro", "CmdExperimentsRun"}:
        check_targets(folder, arguments.targets)
    if function == "CmdExperimentsRun" and arguments.set_param:
        check_changes(arguments.set_param, queue=arguments.queue)
    if function == "CmdArtifactsGet" and not is_placeholder(arguments.name):
        check_artifact(arguments.name)


def check_artifact(name: str) -> None:
    if name not in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["artifacts"]:
        raise UnknownCommandError(f"dvc.yaml names no artifact {name}")


@cache
def stages(folder: Path) -> tuple[str, ...]:
    """The stages of the folder's dvc.yaml, and what it makes of one for each of a list: `updates@cdm-0`."""
    files = [path.read_text() for name in ("dvc.yaml", "dvc.lock") if (path := folder / name).exists()]
    return tuple(name for text in files for name in re.findall(r"^  ([\w@.-]+):", text, re.MULTILINE))


def check_targets(folder: Path, targets: Sequence[str]) -> None:
    for target in targets:
        pattern = re.escape(target).replace(r"\*", ".*")
        if not (folder / "dvc.lock").exists():  # before the first run nobody knows what a matrix makes
            pattern = pattern.partition("@")[0]
        if not is_placeholder(target) and not any(re.fullmatch(pattern, name) for name in stages(folder)):
            raise UnknownCommandError(f"{folder.name}/dvc.yaml has no stage {target}")


def check_changes(changes: Sequence[str], queue: bool) -> None:
    """`KEY=VALUE`s as DVC applies them to params.yaml: they must fit, be allowed, and change something."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

    if any(is_placeholder(change.partition("=")[0]) for change in changes):
        return
    if named := [change for change in changes if change.startswith("+")]:
        raise UnknownCommandError(f"{named[0]}: params.yaml has all keys, so nothing needs a +")
    try:
        sweeps = get_hydra_sweeps({"params.yaml": list(changes)})
    except DvcException as error:
        raise UnknownCommandError(str(error)) from None
    if len(sweeps) > 1 and not queue:
        raise UnknownCommandError("several values need --queue")
    different = 0
    for sweep in sweeps:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "params.yaml"
            shutil.copy(ROOT / "params.yaml", path)
            try:
                apply_overrides(path, sweep["params.yaml"])
                different += load(path) != committed_params()
            except (DvcException, CdmError) as error:
                raise UnknownCommandError(str(error.__cause__ or error)) from None
    if not different:
        raise UnknownCommandError("params.yaml has these values already: it would change nothing")


# The rest.


def check_make(words: list[str], whole: bool) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE)
    for word in words:
        name, assigned, _ = word.partition("=")
        if name not in (variables if assigned else targets):
            raise UnknownCommandError(f"the Makefile has no {'variable' if assigned else 'target'} {name}")


def check_pip(words: list[str], whole: bool) -> None:
    if not words and not whole:
        return
    check_subcommand("pip", {"install"}, words)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"^\.\[(.*)\]$", "\n".join(words), re.MULTILINE):
        if unknown := set(named.split(",")) - set(extras):
            raise UnknownCommandError(f"pyproject.toml has no extra {min(unknown)}")


def check_uv(words: list[str], whole: bool) -> None:
    if words[:1] == ["pip"]:
        if whole or words[1:]:
            check_pip(words[1:], whole)
    else:
        check_subcommand("uv", {"sync", "venv", "run"}, words)
        for option, extra in pairwise(words):
            if option == "--extra":
                check_pip(["install", f".[{extra}]"], whole)


def check_pytest(words: list[str], whole: bool) -> None:
    for word in words:
        if word.startswith("tests") and not (ROOT / word).exists():
            raise UnknownCommandError(f"there is no {word}")
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for option, name in pairwise(words):
        if option == "-m" and name not in {marker.partition(":")[0] for marker in markers}:
            raise UnknownCommandError(f"there is no marker {name}")


def check_subcommand(program: str, known: set[str], words: Sequence[str]) -> None:
    if not words or words[0] not in known:
        raise UnknownCommandError(f"{program} {' '.join(words[:1])}: not one that tests/documented.py knows")


GIT = {
    "add", "branch", "checkout", "clone", "commit", "diff", "fetch", "init", "lfs", "log", "pull", "push",
    "remote", "restore", "status", "switch", "tag",
}  # fmt: skip


def check_folder(words: list[str], whole: bool) -> None:
    """Of `cd` and `source`: a folder or a file of the repository, or one that a command before has made."""
    made = {"cdm", "theirs", ".venv/bin/activate"}
    if not (words[0] in made or is_placeholder(words[0]) or words[0] == ".." or (ROOT / words[0]).exists()):
        raise UnknownCommandError(f"there is no {words[0]}")


def taken(words: list[str], whole: bool) -> None:
    """A program of others, in a line that was read by somebody."""


CHECKS = {
    "cdm": check_cdm,
    "dvc": check_dvc,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "uv": check_uv,
    "pytest": check_pytest,
    "git": lambda words, whole: check_subcommand("git", GIT, words),
    "hf": lambda words, whole: check_subcommand("hf", {"auth", "download"}, words),
    "pre-commit": lambda words, whole: check_subcommand("pre-commit", {"install", "run"}, words),
    "docker": lambda words, whole: check_subcommand("docker", {"build", "run"}, words),
    ".ci/run": taken,
    "cd": check_folder,
    "source": check_folder,
    **dict.fromkeys(["curl", "tensorboard", "ls", "rm", "cp", "ssh", "rsync"], taken),
}
"""What checks the arguments of a program, by its name: (words, whether they are all of them) -> None."""


@cache
def commands() -> tuple[Command, ...]:
    """Those of the repository's pages, params files, code and Makefile; what is said twice, once."""
    found: list[Command] = []
    for page in PAGES:
        found += [*lines_of(page), *mentions(page)]
    for path in [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*.yaml"))]:
        found += mentions(path)
    for top in ("benchmarks", "cdm", "exact", "scorers", "stages"):
        for path in sorted((ROOT / top).rglob("*.py")):
            found += mentions(path)
    found += makefile_messages()
    return tuple({(each.text, each.whole): each for each in reversed(found)}.values())
