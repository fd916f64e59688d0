"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from ruamel.yaml import YAML
from torch import Tensor
from torch.nn import init

from cdm.models.manifest import TeacherManifest, describe
from cdm.params import Params, parse
from tests import launching, tiny_pipelines

ROOT = Path(__file__).parent.parent

# Tensors are small here: on one thread they are done before others have woken up.
torch.set_num_threads(1)


def unless_meta(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without what a tensor on the device meta, which has no values, takes longest for: a third of loading a model."""

    @wraps(fill)
    def filled(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else fill(tensor, *arguments, **options)

    return filled


for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "normal_", "trunc_normal_", "zeros_", "ones_"):
    setattr(init, name, unless_meta(getattr(init, name)))
# A program's tree of commands is built once, and not for every call of it in a process.
typer.main.get_command = cache(typer.main.get_command)

SERVER = pytest.StashKey[ExitStack]()
LONGEST = (
    "test_family_pipelines.py",
    "test_pipeline.py",
    "test_plan.py",
    "test_comparison.py",
    "test_gpu_benchmark.py",
)
"""Files whose tests take longest. They go first, so that none of them keeps one process busy when others are done."""


def pytest_configure(config: pytest.Config) -> None:
    """The processes of all tests are forked from one, also where pytest-xdist has several workers."""
    # A shell has its background processes ignore the signal of Ctrl-C, and what tests start would ignore it too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        config.stash[SERVER] = ExitStack()
        config.stash[SERVER].enter_context(launching.fork_server())


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVER in config.stash:
        config.stash[SERVER].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a complete pipeline with random weights, by its name in `tests.tiny_pipelines`: read only."""

    @cache
    def saved(name: str) -> Path:
        return tiny_pipelines.save(name, tmp_path_factory.mktemp("tiny") / name)

    return saved


@pytest.fixture(scope="session")
def tiny_sd3(tiny_pipeline: Callable[[str], Path]) -> Path:
    """A complete StableDiffusion3Pipeline folder with random weights: 8x8x4 latents, 32x32 pictures, no T5."""
    return tiny_pipeline("sd3")


@pytest.fixture(scope="session")
def tiny_teacher(tiny_sd3: Path) -> TeacherManifest:
    """What the stage `teacher` finds out about `tiny_sd3`."""
    return describe("sd3", str(tiny_sd3), None)


@pytest.fixture
def tiny_params(tiny_sd3: Path, tmp_path: Path) -> Params:
    return make_tiny_params(tiny_sd3, tmp_path)


def make_tiny_params(teacher: Path, folder: Path) -> Params:
    """Parameters of a run with `tiny_sd3` in seconds: five training prompts, three evaluation prompts."""
    lists = folder / "lists"
    lists.mkdir()
    train = [f"a red {digit} on black paper" for digit in ("one", "two", "three", "four", "five", "one")]
    evaluation = ["a blue six on white paper", "a pink nine on gray paper", "a cyan zero on brown paper"]
    (lists / "train.txt").write_text("\n".join([*train, "", evaluation[0]]))
    (lists / "eval.txt").write_text("\n".join([*evaluation, "a green two on gray paper"]))
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["teacher"] |= {"source": str(teacher), "guidance_scale": 3.0}
    values["prompts"] |= {
        "train": [str(lists / "train.txt")],
        "eval": [str(lists / "eval.txt")],
        "eval_count": 3,
    }
    values["latents"] |= {"steps": 4, "per_prompt": 2}
    values["evaluate"] |= {"neighbours": 1}
    values["distill"] |= {"fake_knows_level": False}
    values["sample"] |= {"steps": [1, 2], "teacher_steps": [1], "pictures": 2}
    values["runtime"] |= {"device": "cpu", "batch_size": 2}
    return parse(values)
