"""Drawing in several processes: the same files as in one, also where one has begun and several go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cdm.data import sampling
from cdm.errors import CdmError
from cdm.families import get_family
from cdm.models.manifest import TeacherManifest
from cdm.params import Params
from cdm.system.launcher import LAUNCHED, launch
from cdm.system.processes import Processes
from tests import run_sampling
from tests.inputs import build_prompts
from tests.launching import succeed_in_two_processes


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_batches_begin_anew_at_every_shard() -> None:
    assert sampling._batches(0, 10, 3, 4) == [
        range(3), range(3, 4), range(4, 7), range(7, 8), range(8, 10)
    ]  # fmt: skip
    assert sampling._batches(4, 10, 3, 4) == sampling._batches(0, 10, 3, 4)[2:]
    assert sampling._batches(8, 8, 3, 4) == []


def test_two_processes_write_the_files_of_one_and_go_on_where_it_stopped(
    tiny_params: Params, tiny_teacher: TeacherManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = tmp_path / "one"
    uneven = tiny_params.runtime.model_copy(update={"batch_size": 3})  # shards of 4: batches of 3, 1 and 2
    params = tiny_params.model_copy(update={"runtime": uneven})
    build_prompts(params, tiny_teacher, world / "prompts")
    (world / "params.json").write_text(params.model_dump_json())
    tiny_teacher.write(world / "teacher.json")
    family = get_family("sd3")
    transformer = family.load_transformer(tiny_teacher.folder())
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.2)
    family.save_student(transformer, tiny_teacher.folder(), world / "student")
    two = tmp_path / "two"
    shutil.copytree(world, two)

    monkeypatch.setattr(sampling, "shard_rows", lambda _: run_sampling.ROWS)
    run_sampling.draw(world)

    original, calls = type(family).sample, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(type(family), "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sampling.draw(two)  # its first shard is written
    assert (two / ".latents.partial" / "shard-00000.safetensors").exists()
    succeed_in_two_processes("tests.run_sampling", two)
    for name in ("latents", "samples"):
        assert tree(two / name) == tree(world / name)
    assert not list(two.glob(".*.partial"))


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join("cpu")
    assert (alone.rank, alone.count, alone.is_main, alone.agree(7)) == (0, 1, True, 7)
    rows = alone.draw([range(2), range(2, 3)], lambda batch: {"k": torch.tensor(list(batch))})
    assert [row["k"].tolist() for row in rows] == [[0, 1], [2]]


def test_processes_do_not_launch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launch("stages.latents", None)
    for name in (LAUNCHED, "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            launch("stages.latents", "configs/none.yaml")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(CdmError, match=r"runtime\.accelerate_config: configs/none\.yaml: no such file"):
        launch("stages.latents", "configs/none.yaml")
