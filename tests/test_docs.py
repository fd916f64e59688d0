"""Documented commands are taken by the programs that they name, links lead somewhere, quoted messages exist, and the
loop that the pages teach runs as it stands there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cdm.params import load
from tests import documented
from tests.documented import ROOT, Command, UnknownCommandError, check
from tests.launching import python
from tests.repository import Repository, make_repository


@pytest.mark.parametrize("command", documented.commands(), ids=str)
def test_a_command_is_taken(command: Command) -> None:
    check(command)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cdm plan params.yaml --speed", "No such option"),
        ("cdm plans params.yaml", "plans"),
        ("cdm sample 'a red three'", "out"),
        ("cdm recipe use cmd", "there is no recipe cmd"),
        ("make repo", "no target repo"),
        ("make repro TORCH=1", "no variable TORCH"),
        ("dvc exp rum", "invalid choice"),
        ("dvc repro distil", "no stage distil"),
        ("dvc --cd comparison repro distill", "no stage distill"),
        ("dvc exp run -S schedule.longest=3", "longest"),
        ("dvc exp run -S +schedule.longest=3", "nothing needs a +"),
        ("dvc exp run -S schedule.max_len=long", "max_len"),
        ("dvc exp run -S seed=0,1", "--queue"),
        ("dvc exp run -S seed=0", "it would change nothing"),
        ("dvc artifacts get YOURS pupil", "no artifact pupil"),
        ("python -m exact --seed 1", "No such option"),
        ("python -m comparison.tables", "no module"),
        ("pip install -e '.[all]'", "no extra all"),
        ("pytest tests/test_all.py", "there is no tests/test_all.py"),
        ("git frobnicate", "git frobnicate"),
        ("emacs README.md", "emacs: no program"),
        ("dvc repro && make repo", "no target repo"),
    ],
)
def test_what_would_not_work_is_found(text: str, says: str) -> None:
    with pytest.raises(UnknownCommandError, match=re.escape(says)):
        check(Command(ROOT / "README.md", 1, text, whole=True))


@pytest.mark.parametrize("page", documented.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_says_what_it_is(page: Path) -> None:
    """So that no command escapes the tests above."""
    for line, language, _ in documented.blocks(page.read_text()):
        assert language in documented.BLOCKS, f"line {line}: a block of {language or 'nothing'}"


def tracked_pages() -> list[Path]:
    """Every page of the repository, as Git knows it, or without Git all that lie there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    names = listed.stdout.split() if listed.returncode == 0 else [str(page) for page in documented.PAGES]
    return sorted(ROOT / name for name in names if (ROOT / name).exists())


@cache
def anchors(page: Path) -> set[str]:
    """What links to a page may name behind #: its headings, as GitHub and the site spell them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", documented.without_blocks(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", tracked_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", documented.without_blocks(page.read_text())):
        name, _, heading = link.partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not heading or heading in anchors(target), link


def test_every_page_is_a_click_from_the_readme_and_in_the_site() -> None:
    pages = {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    readme = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    assert pages <= readme
    site = (ROOT / "mkdocs.yml").read_text()
    assert {page for page in pages if f": {page.removeprefix('docs/')}\n" not in site} == set()


ELSEWHERE = {
    "dvc: command not found",
    "cdm: command not found",
    "No module named stages",
    "CUDA out of memory",
    "less than or equal to ...",
}
"""Messages of a shell, of Python, of torch and of pydantic, whose sources are not searched."""
NAMES = {"make repro", "dvc status", "params.yaml", "teacher", "distill", "latents", "sample", "prompts"}
"""What the same cells name beside messages."""


def quoted_messages() -> list[str]:
    """The messages of docs/trouble.md: what the first cells of its tables have in backticks."""
    page = (ROOT / "docs/trouble.md").read_text()
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE)]
    found = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    return [message for message in found if message not in NAMES | ELSEWHERE]


@cache
def spoken() -> str:
    """Every text in the sources of this project and of DVC, a line each; what is filled in is an ellipsis."""
    packages = [ROOT / "cdm", ROOT / "stages"]
    for name in ("dvc", "dvc_data", "dvc_objects", "hydra"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        packages += [Path(each) for each in spec.submodule_search_locations or ()]
    lines = [(ROOT / "Makefile").read_text().replace("$(PYTHON)", "...")]
    for package in packages:
        for path in package.rglob("*.py"):
            lines += texts(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(" ".join(line.split()) for line in lines)


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{[^{}]*\}", "...", node.value)


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_of_the_page_about_trouble_exists(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    assert re.search("[^\n]*".join(parts), spoken()), message


def test_the_student_is_an_artifact() -> None:
    """As DVC reads it, under a name that tags may have."""
    from dvc.repo.artifacts import check_name_format
    from dvc.schema import COMPILED_MULTI_STAGE_SCHEMA

    pipeline = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    COMPILED_MULTI_STAGE_SCHEMA(pipeline)
    ((name, artifact),) = pipeline["artifacts"].items()
    check_name_format(name)
    assert artifact["path"] in pipeline["stages"]["distill"]["outs"]


# The loop, run as the pages have it.


class Reader:
    """Somebody who types the commands of a page, one after the other, in a clone of the project."""

    def __init__(self, repository: Repository, places: dict[str, str]) -> None:
        self.repository, self.places = repository, places
        repository.environment["COLUMNS"] = "120"
        self.path = repository.environment["PATH"]
        self.said: dict[str, str] = {}

    def follow(self, page: str, section: str) -> None:
        """Types the lines of the `bash` blocks below a heading."""
        for command in documented.lines_of(ROOT / page, section):
            for part in command.text.split(" && "):
                self.said[part] = self.type(part)

    def type(self, line: str) -> str:
        for name, place in self.places.items():
            line = line.replace(name, shlex.quote(place))
        words = shlex.split(line)
        if words[0] == "cd":
            self.enter(self.repository.folder / words[1])
            environment_of(self.repository.folder)
            return ""
        if words[0] == "source":
            scripts = (self.repository.folder / words[1]).parent
            assert (scripts / "activate").is_file()
            self.repository.environment["PATH"] = f"{scripts}{os.pathsep}{self.path}"
            return ""
        return self.repository.run(*words)

    def enter(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.repository.folder = folder
        self.repository.environment["PYTHONPATH"] = str(folder)


COMMANDS = {"cdm": "cdm.cli", "dvc": "dvc"}
"""Commands of an environment, and the modules that they run."""


def environment_of(clone: Path) -> None:
    """An environment in the clone in which everything is installed: that of the tests, with the python that forks."""
    environment, scripts = clone / ".venv", Path(sys.executable).parent
    (environment / "bin").mkdir(parents=True)
    for entry in [*Path(sys.prefix).iterdir(), *scripts.iterdir()]:
        if entry.name not in {"bin", "installed", "python", *COMMANDS}:
            (environment / ("bin" if entry.parent == scripts else "") / entry.name).symlink_to(entry)
    (environment / "bin/python").symlink_to(python())
    for name, module in COMMANDS.items():
        script = environment / "bin" / name
        script.write_text(f'#!/bin/sh\nexec python -m {module} "$@"\n')
        script.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(clone / name, (0, 0))
    (environment / "installed").touch()


@pytest.fixture(scope="module")
def reader(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader in an empty folder, and what the project published: tiny parameters. Paths have a space."""
    work, home, source = (tmp_path_factory.mktemp(name) for name in ("a reader", "home", "source"))
    files = ("Makefile", "pyproject.toml", "constraints.txt")
    published = make_repository(source, home, tiny_sd3, *files)
    published.run("git", "clone", "--quiet", "--bare", ".", str(work / "published.git"))
    branch = published.run("git", "branch", "--show-current").strip()
    published.run("git", "init", "--quiet", "--bare", f"--initial-branch={branch}", str(work / "own.git"))
    places = {
        "REPOSITORY": str(work / "published.git"),
        "YOURS": str(work / "own.git"),
        "/mnt/results/cdm": str(work / "results"),
    }
    return Reader(Repository(work, home), places)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_first_experiment_and_sharing_run_as_they_stand(reader: Reader) -> None:
    """From the clone to that of a colleague, who has everything and nothing to do."""
    repository, work = reader.repository, reader.repository.folder
    tutorial, sharing = "docs/first-experiment.md", "docs/sharing.md"

    for section in ("1. Get a result", "2. Look at it", "3. Make your own baseline", "4. Three experiments"):
        reader.follow(tutorial, section)
    own = repository.folder
    assert own == work / "cdm"
    assert "Student, 2 steps" in reader.said["make repro"]
    for name in ("shorter", "stronger", "without"):
        (said,) = [text for command, text in reader.said.items() if f"--name {name} " in command]
        assert re.findall(r"Running stage '(\w+)'", said) == ["teacher", "distill", "sample", "evaluate"]
    reader.follow(tutorial, "5. Compare them")
    assert {"shorter", "stronger", "without"} <= set(re.findall(r"\w+", reader.said["dvc exp show"]))
    reader.follow(tutorial, "6. Keep one, or go back")
    assert re.findall(r"Running stage '(\w+)'", reader.said["dvc repro"]) == ["teacher"]
    assert repository.run("git", "status", "--porcelain", "--untracked-files=no") == ""
    assert repository.run("git", "branch", "--list", "try-shorter")
    student = (own / "models/student/model_index.json").read_bytes()

    reader.follow(sharing, "Push")
    reader.enter(work)
    reader.follow(sharing, "Pull")
    assert repository.folder == work / "theirs"
    assert re.findall(r"Running stage '(\w+)'", reader.said["dvc repro"]) == ["teacher"]
    assert "shorter" in reader.said["dvc exp list origin"]
    assert (repository.folder / "models/student/model_index.json").read_bytes() == student
    assert load(repository.folder / "params.yaml").schedule.max_len == 6, "the experiment that was applied"

    reader.enter(own)
    tag, push, artifact = documented.lines_of(ROOT / sharing, "The student alone")
    for command in (tag, push):
        reader.type(command.text)
    reader.enter(work / "another project")
    reader.type(artifact.text)
    assert (repository.folder / "student/model_index.json").read_bytes() == student
    reader.type("dvc get YOURS models/student --out again")
    assert (repository.folder / "again/model_index.json").read_bytes() == student


def test_what_the_tutorial_says_of_sharing_is_what_the_page_about_it_says() -> None:
    """So that it is run above, too."""
    page = [command.text for command in documented.lines_of(ROOT / "docs/sharing.md")]
    tutorial = [
        command.text
        for section in ("3. Make your own baseline", "7. Share it")
        for command in documented.lines_of(ROOT / "docs/first-experiment.md", section)
    ]
    shared = [text for text in tutorial if text not in ("make baseline", "cdm compare")]
    assert len(shared) > 8
    assert set(shared) <= set(page)
