"""Recipes: each is a params file in order, named and explained; what it says of memory is what `cdm plan` says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cdm.data.prompt_lists import read_prompts
from cdm.errors import CdmError
from cdm.handover import recipes
from cdm.params import Lora, load
from cdm.planning import architecture, memory
from cdm.preflight import check_paths
from tests.test_cli import Command, command  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
ONE_GPU = [path for path in FILES if re.search(r"-\d+gb$", path.stem)]
CONTEXT, WASTE = 1e9, 1.1
"""What docs/planning.md says to leave: CUDA's own memory in bytes, and the allocator's share."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cdm.preflight.find_spec", lambda package: package)  # which may be absent here
    monkeypatch.setattr("cdm.preflight.missing_models", lambda *_: [])
    check_paths(load(path))


def test_the_recipes_are_listed_with_a_line_each(command: Command) -> None:  # noqa: F811
    lines = command("recipe", "list", "--recipes", FOLDER).out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in FILES]
    assert {"sd3-medium", "sd3-medium-lora-24gb", "sd3-medium-lora-80gb"} <= {path.stem for path in FILES}
    assert {"longcat-image", "longcat-image-lora-24gb", "longcat-image-lora-80gb"} <= {
        path.stem for path in FILES
    }
    assert {"sd3-medium-paper", "longcat-image-paper"} <= {path.stem for path in FILES}
    for line in lines:
        assert len(line.split(maxsplit=1)) == 2, f"{line} has no comment at its head"
        assert len(line) < 160


def test_a_folder_without_recipes_says_where_to_be(command: Command, tmp_path: Path) -> None:  # noqa: F811
    error = command("recipe", "list", "--recipes", tmp_path).error
    assert "no recipes there: run this in the root of the repository" in error


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a committed params.yaml and two recipes; it is the current folder."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(
        "# A small one, for tests. It has\n# two lines.\nseed: 1\n"
    )
    (tmp_path / "recipes" / "large.yaml").write_text("# A large one\nseed: 2\n")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "start"],
    ):
        subprocess.run(["git", *arguments], check=True)
    return tmp_path


def test_a_recipe_becomes_the_params_file(command: Command, repository: Path) -> None:  # noqa: F811
    result = command("recipe", "use", "small")
    assert (repository / "params.yaml").read_bytes() == (repository / "recipes" / "small.yaml").read_bytes()
    assert result.out.startswith("params.yaml: A small one, for tests\nNext:\n")
    for step in ("cdm params check params.yaml", "cdm plan params.yaml", "dvc repro"):
        assert step in result.out
    command("recipe", "use", "large", "--to", "other.yaml")
    assert (repository / "other.yaml").read_text() == "# A large one\nseed: 2\n"


def test_what_no_commit_holds_is_not_overwritten(command: Command, repository: Path) -> None:  # noqa: F811
    (repository / "params.yaml").write_text("seed: 9\n")
    error = command("recipe", "use", "small").error
    assert (
        "params.yaml: has changes that no commit holds: commit them, give --to another name, or --force"
        in error
    )
    assert (repository / "params.yaml").read_text() == "seed: 9\n"
    assert command("recipe", "use", "small", "--force").code == 0
    assert command("recipe", "use", "small").code == 0, "it is there already"
    (repository / "new.yaml").write_text("mine")
    assert (
        "new.yaml: has changes that no commit holds"
        in command("recipe", "use", "large", "--to", "new.yaml").error
    )


def test_an_unknown_recipe_names_those_there_are(repository: Path) -> None:
    with pytest.raises(CdmError, match="no recipe 'smal': there are large, small"):
        recipes.use_recipe(Path("recipes"), "smal", Path("params.yaml"))


def test_the_prompts_to_start_with_are_distinct_and_apart() -> None:
    train, report = read_prompts([FOLDER / "prompts" / "train.txt"])
    evaluation, _ = read_prompts([FOLDER / "prompts" / "eval.txt"])
    assert (len(train), len(evaluation)) == (4000, 64)
    assert report.duplicates == report.empty == 0
    assert not set(train) & set(evaluation)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("path", ONE_GPU, ids=lambda path: path.stem)
def test_one_gpu_is_enough_and_the_comment_says_how_much(path: Path) -> None:
    params = load(path)
    found = architecture.find(params.teacher, params.prompts.max_sequence_length)
    peak = memory.MemoryPlanner(params, found, 1, "none").plan(params.distill.gradient_checkpointing).peak
    card = int(re.search(r"(\d+)gb$", path.stem)[1]) * 2**30  # type: ignore[index]
    assert peak * WASTE + CONTEXT < card
    (recipe,) = (each for each in recipes.list_recipes(FOLDER) if each.path == path)
    (quoted,) = re.findall(r"`cdm plan` counts ([\d.]+) GB", " ".join(recipe.comment))
    assert peak / 1e9 == pytest.approx(float(quoted), rel=0.03)


@pytest.mark.parametrize(
    ("name", "batch", "iterations"), [("sd3-medium", 128, 4000), ("longcat-image", 64, 2000)]
)
def test_a_recipe_of_the_paper_has_the_released_settings(name: str, batch: int, iterations: int) -> None:
    params, ours = (load(FOLDER / f"{recipe}.yaml") for recipe in (f"{name}-paper", name))
    schedule, distill = params.schedule, params.distill
    assert (schedule.min_len, schedule.max_len) == (1, 28)
    assert (schedule.sigma_min, schedule.sigma_max, schedule.spacing) == (0.25, 0.95, "independent")
    assert (schedule.off_range, distill.renoise_min, distill.renoise_max) == ((0, 1), 0.02, 0.98)
    assert (distill.batch_size, distill.iterations, distill.student_every) == (batch, iterations, 2)
    assert (distill.student.lr, distill.fake.lr, distill.merge, distill.ema) == (1e-5, 5e-6, 0.001, 0.999)
    assert distill.lora == Lora(rank=64, alpha=128, targets="attention+feed-forward")
    losses = distill.losses
    assert losses.weights == {"ca": 1, "dm": 1, "cdm": 1}
    assert (losses.ca.scale, losses.ca.bounded, losses.dm.bounded, losses.cdm.bounded) == (
        7,
        True,
        False,
        False,
    )
    assert (params.teacher.guidance_scale, params.latents.steps) == (4.5, 50)
    assert (distill.rollouts, distill.fake_knows_level) == ("fresh", False)
    # Ours: the same levels for guidance and matching, a fake score that knows the level, stratified levels.
    assert {
        ours.distill.losses.ca.bounded,
        ours.distill.losses.dm.bounded,
        ours.distill.losses.cdm.bounded,
    } == {True}
    assert (ours.distill.fake_knows_level, ours.schedule.spacing) == (True, "stratified")
    apart = {
        "distill.lora",
        "distill.fake_draws",
        "distill.fake_knows_level",
        "distill.losses.dm.bounded",
        "distill.losses.cdm.bounded",
        "distill.rollouts",
        "schedule.off_range",
        "schedule.spacing",
        "runtime.accelerate_config",
    } | ({"latents.steps"} if name == "sd3-medium" else set())
    assert differing(params.model_dump(), ours.model_dump()) == apart, "the heads and docs/paper.md say these"


def differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys whose values differ; a section that one of them leaves out counts as one."""
    found = set()
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other[key], dict):
            found |= differing(value, other[key], f"{prefix}{key}.")
        elif value != other[key]:
            found.add(prefix + key)
    return found
