"""Stores: written, resumed and read back; every kind of damage is found and named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm.data.store import MANIFEST, ShardWriter, Store, StoreError, is_complete, make_empty, shard_rows
from cdm.system import files as files_module
from cdm.system import progress
from cdm.system.files import sha256


def rows(start: int, stop: int) -> dict[str, Tensor]:
    index = torch.arange(start, stop)
    return {"values": index[:, None, None] * torch.ones(2, 3), "index": index}


def write(folder: Path, count: int = 10, rows_per_shard: int = 4, batch: int = 3) -> Store:
    with ShardWriter(folder, rows_per_shard, {"seed": 0}) as writer:
        for start in range(0, count, batch):
            writer.append(rows(start, min(start + batch, count)))
    return Store(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    assert len(store) == 10
    assert store.names == ["index", "values"]
    assert store.metadata == {"seed": 0}
    got = store.rows([9, 0, 4, 4, 3])
    assert got["index"].tolist() == [9, 0, 4, 4, 3]
    assert got["values"].shape == (5, 2, 3)
    assert got["values"][:, 1, 2].tolist() == [9, 0, 4, 4, 3]
    assert torch.equal(store.all()["index"], torch.arange(10))
    assert store.rows([])["values"].shape == (0, 2, 3)
    store.verify()


def test_rows_that_a_network_has_left_in_another_order_in_memory_are_written(tmp_path: Path) -> None:
    """Convolutions return pictures channels last; `safetensors` takes rows one after the other alone."""
    pictures = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)
    last = pictures.contiguous(memory_format=torch.channels_last)
    transposed = pictures.transpose(1, 3).contiguous().transpose(1, 3)
    assert not last.is_contiguous()
    with ShardWriter(tmp_path / "store", 3, {}) as writer:
        writer.append({"a": last, "b": transposed})
    store = Store(tmp_path / "store")
    assert all(torch.equal(tensor, pictures) for tensor in store.all().values())
    with ShardWriter(tmp_path / "plain", 3, {}) as writer:
        writer.append({"a": pictures, "b": pictures})
    assert files(tmp_path / "store") == files(tmp_path / "plain")


def test_dtypes_survive(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2).bfloat16(),
        "b": torch.arange(3, dtype=torch.uint8),
        "c": torch.tensor([True, False, True]),
    }
    with ShardWriter(tmp_path / "store", 2, {}) as writer:
        writer.append(tensors)
    loaded = Store(tmp_path / "store").all()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: t.dtype for name, t in tensors.items()
    }
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("index", [10, -1])
def test_a_row_outside_is_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        write(tmp_path / "store").rows([0, index])


def test_the_bytes_do_not_depend_on_batches(tmp_path: Path) -> None:
    write(tmp_path / "a", batch=1)
    write(tmp_path / "b", batch=7)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == [MANIFEST, *(f"shard-0000{i}.safetensors" for i in range(3))]


def interrupted(folder: Path, rows_written: int, metadata: dict[str, int]) -> None:
    with contextlib.suppress(KeyboardInterrupt), ShardWriter(folder, 4, metadata) as writer:
        writer.append(rows(0, rows_written))
        raise KeyboardInterrupt


def test_an_interrupted_run_is_resumed_after_its_whole_shards(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", 9, {"seed": 0})
    assert not (tmp_path / "store").exists(), "an interrupted run must not look finished"
    with ShardWriter(tmp_path / "store", 4, {"seed": 0}) as writer:
        assert writer.rows_done == 8
        writer.append(rows(8, 10))
    write(tmp_path / "straight")
    assert files(tmp_path / "store") == files(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "straight"], "nothing is left behind"


@pytest.mark.parametrize("damage", ["a flipped byte", "another shard", "a missing shard", "no record"])
def test_a_damaged_shard_of_an_interrupted_run_is_written_again(tmp_path: Path, damage: str) -> None:
    interrupted(tmp_path / "store", 13, {"seed": 0})
    partial = tmp_path / ".store.partial"
    shard, other = partial / "shard-00001.safetensors", partial / "shard-00002.safetensors"
    if damage == "a flipped byte":
        flip(shard)
    elif damage == "another shard":
        shard.write_bytes(other.read_bytes())
    elif damage == "a missing shard":
        shard.unlink()
    else:
        (partial / "resume.json").unlink()
    with ShardWriter(tmp_path / "store", 4, {"seed": 0}) as writer:
        assert writer.rows_done == (0 if damage == "no record" else 4)
        writer.append(rows(writer.rows_done, 14))
    write(tmp_path / "straight", count=14)
    assert files(tmp_path / "store") == files(tmp_path / "straight")


@pytest.mark.parametrize("change", ["metadata", "fingerprint", "rows_per_shard"])
def test_another_run_starts_anew(tmp_path: Path, change: str) -> None:
    interrupted(tmp_path / "store", 9, {"seed": 0})
    writer = ShardWriter(
        tmp_path / "store",
        rows_per_shard=2 if change == "rows_per_shard" else 4,
        metadata={"seed": 1 if change == "metadata" else 0},
        fingerprint="other code" if change == "fingerprint" else "",
    )
    assert writer.rows_done == 0
    writer.append(rows(100, 101))
    writer.close()
    assert Store(tmp_path / "store").all()["index"].tolist() == [100]


def test_a_shard_cut_short_by_a_crash_is_written_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", 9, {"seed": 0})
    shard = tmp_path / ".store.partial" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert ShardWriter(tmp_path / "store", 4, {"seed": 0}).rows_done == 4


def test_a_new_store_replaces_an_old_one_but_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "store", count=10)
    assert len(write(tmp_path / "store", count=2)) == 2
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(StoreError, match="photos: exists and holds other things"):
        ShardWriter(tmp_path / "photos", 4, {})
    assert (tmp_path / "photos" / "cat.png").exists()


def test_rows_of_another_layout_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "store", 4, {})
    writer.append(rows(0, 1))
    for wrong in (
        {"values": torch.ones(1, 2, 3)},
        {"values": torch.ones(1, 3, 3), "index": torch.arange(1)},
        {"values": torch.ones(1, 2, 3).double(), "index": torch.arange(1)},
        {"values": torch.ones(2, 2, 3), "index": torch.arange(1)},
    ):
        with pytest.raises(ValueError, match=r"unequal|the store's are"):
            writer.append(wrong)


def test_a_store_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        ShardWriter(tmp_path / "store", 4, {}).close()


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_found_when_its_shard_is_read(tmp_path: Path) -> None:
    write(tmp_path / "store")
    flip(tmp_path / "store" / "shard-00001.safetensors")
    store = Store(tmp_path / "store")
    assert store.rows([0, 9])["index"].tolist() == [0, 9], "what is not damaged can be read"
    for read in (store.verify, store.all, lambda: store.rows([9, 5])):
        with pytest.raises(StoreError, match=r"shard-00001.safetensors: its hash differs .*: remove") as error:
            read()
        assert len(str(error.value).splitlines()) == 1


def test_every_byte_of_a_shard_counts(tmp_path: Path) -> None:
    write(tmp_path / "store", count=4)
    shard = tmp_path / "store" / "shard-00000.safetensors"
    size = shard.stat().st_size
    for at in (0, 1, 9, size // 2, size - 1):
        flip(shard, at)
        with pytest.raises(StoreError, match="its hash differs"):
            Store(tmp_path / "store").rows([0])
        flip(shard, at)
    assert Store(tmp_path / "store").rows([3])["index"].tolist() == [3]


def test_a_process_reads_a_shard_whole_once_and_only_those_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "store")
    for path in (tmp_path / "store").iterdir():
        os.utime(path, (1, 1))  # long ago: the time of a change tells one state from another
    read: list[str] = []
    original = files_module.sha256

    def watched(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(files_module, "sha256", watched)
    for _ in range(2):  # two readers of one folder
        store = Store(tmp_path / "store")
        for _ in range(3):
            store.rows([0, 9, 3])
    assert read == ["shard-00000.safetensors", "shard-00002.safetensors"]


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    (tmp_path / "store" / "shard-00002.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors: missing"):
        Store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors: missing"):
        store.verify()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors: missing"):
        store.rows([8])
    assert store.rows([0])["index"].tolist() == [0]


def test_a_wrong_shape_is_found_where_the_hash_is_right(tmp_path: Path) -> None:
    write(tmp_path / "store")
    shard, manifest = tmp_path / "store" / "shard-00000.safetensors", tmp_path / "store" / MANIFEST
    tensors = load_file(shard)
    save_file({**tensors, "values": tensors["values"][:, :1].clone()}, shard)
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = sha256(shard)
    manifest.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors: shapes .* are not the manifest's"):
        Store(tmp_path / "store").verify()
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors: shapes"):
        Store(tmp_path / "store").rows([1])


def test_all_damage_is_named_at_once(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    (tmp_path / "store" / "shard-00000.safetensors").write_bytes(b"not safetensors")
    (tmp_path / "store" / "shard-00002.safetensors").unlink()
    with pytest.raises(StoreError) as error:
        store.verify()
    lines = str(error.value).splitlines()
    assert ["shard-00000" in line for line in lines] == [True, False]
    assert ["shard-00002" in line for line in lines] == [False, True]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "cdm-store-1"}', '{"format": "other"}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: str | None) -> None:
    write(tmp_path / "store")
    if content is None:
        (tmp_path / "store" / MANIFEST).unlink()
    else:
        (tmp_path / "store" / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json: .*damaged"):
        Store(tmp_path / "store")


def test_a_manifest_that_does_not_add_up_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = tmp_path / "store" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "rows": 11}))
    with pytest.raises(StoreError, match="do not add up to 11 rows"):
        Store(tmp_path / "store")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        Store(tmp_path / "store")


def test_complete_means_whole_and_of_the_same_metadata(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "store", {"seed": 0})
    write(tmp_path / "store")
    assert is_complete(tmp_path / "store", {"seed": 0})
    assert not is_complete(tmp_path / "store", {"seed": 1})


@pytest.mark.parametrize(("row_bytes", "rows_"), [(1, 256), (2**20, 256), (2**22, 64), (2**30, 1)])
def test_shards_are_bounded_in_rows_and_bytes(row_bytes: int, rows_: int) -> None:
    assert shard_rows(row_bytes) == rows_


def test_progress_in_a_log_is_rare_and_says_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(4), "encode", unit="batch", detail=lambda: "loss 1")) == [0, 1, 2, 3]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "encode: 2/4 batch, 15.50 s/batch, 00:31 left, loss 1",
        "encode: 4/4 batch, 15.50 s/batch, 00:00 left, loss 1",
    ]


def test_progress_on_a_terminal_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    assert list(progress.track(iter("ab"), "encode", total=2, detail=lambda: "loss 1")) == ["a", "b"]
    captured = capsys.readouterr()
    assert "encode: 100%" in captured.err
    assert "2/2" in captured.err


def test_the_time_left_follows_the_last_minutes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    slow, fast = 300.0, 30.0
    for item in progress.track(range(100), "draw", unit="sample"):
        clock += slow if item < 5 else fast
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "draw: 2/100 sample, 300.00 s/sample, 8:10:00 left"
    assert lines[50] == "draw: 51/100 sample, 30.00 s/sample, 24:30 left"


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("ab"), "encode")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_cast_that_concerns_nothing_is_not_warned_of_and_one_that_does_is(tiny_sd3: Path) -> None:
    from cdm.families import get_family

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    transformer = get_family("sd3").load_transformer(tiny_sd3)
    logger.addHandler(handler)
    try:
        transformer.to(torch.bfloat16)
        assert said == []
        transformer._keep_in_fp32_modules = ["norm_out"]
        transformer.to(torch.bfloat16)
        assert len(said) == 1
        assert "norm_out" in said[0]
    finally:
        logger.removeHandler(handler)


def changed(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


EDITS: dict[str, Callable[[Any], None]] = {
    "no rows": lambda m: m.pop("rows"),
    "rows as text": lambda m: m.update(rows="10"),
    "rows as a list": lambda m: m.update(rows=[10]),
    "half a row": lambda m: m.update(rows=10.5),
    "no tensors": lambda m: m.update(tensors={}),
    "tensors as a list": lambda m: m.update(tensors=["values"]),
    "a tensor without shape": lambda m: m["tensors"]["values"].pop("shape"),
    "a dtype that is none": lambda m: m["tensors"]["values"].update(dtype="float99"),
    "a dtype that is a function": lambda m: m["tensors"]["values"].update(dtype="zeros"),
    "a negative size": lambda m: m["tensors"]["values"].update(shape=[-2, 3]),
    "a size as text": lambda m: m["tensors"]["values"].update(shape=["2", 3]),
    "a size that is true": lambda m: m["tensors"]["values"].update(shape=[True, 3]),
    "no shards": lambda m: m.update(shards=[]),
    "shards as an object": lambda m: m.update(shards={}),
    "a shard as text": lambda m: m["shards"].insert(0, "shard-00000.safetensors"),
    "a shard without a hash": lambda m: m["shards"][0].pop("sha256"),
    "a hash that is none": lambda m: m["shards"][0].update(sha256=None),
    "a hash cut short": lambda m: m["shards"][0].update(sha256="ab"),
    "a shard elsewhere": lambda m: m["shards"][0].update(file="../other/shard-00000.safetensors"),
    "a shard of no rows": lambda m: m["shards"][0].update(rows=0),
    "a shard of negative rows": lambda m: (m["shards"][0].update(rows=-4), m.update(rows=2)),
    "a shard that is not there": lambda m: m["shards"][0].update(file="shard-00007.safetensors"),
    "no metadata": lambda m: m.pop("metadata"),
    "metadata as a list": lambda m: m.update(metadata=[]),
}
"""Edits of a manifest that no `Store` opens."""


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_one_line(tmp_path: Path, edit: str) -> None:
    write(tmp_path / "store")
    changed(tmp_path / "store" / MANIFEST, EDITS[edit])
    with pytest.raises(StoreError) as error:
        Store(tmp_path / "store")
    assert "\n" not in str(error.value)
    assert f"remove {tmp_path / 'store'} and run" in str(error.value)
    assert not is_complete(tmp_path / "store", {"seed": 0})


def test_a_shape_of_terabytes_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    write(tmp_path / "store")
    changed(tmp_path / "store" / MANIFEST, lambda m: m["tensors"]["values"].update(shape=[10**9, 10**6]))
    with pytest.raises(StoreError, match="are not the manifest's"):
        Store(tmp_path / "store").rows([1])


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 5000, b"\x00" * 100, b""])
def test_a_manifest_that_is_no_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_bytes(content)
    with pytest.raises(StoreError, match="missing or damaged"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("value", [None, "0", [], True, "x" * 10**6])
def test_metadata_of_another_kind_are_one_line(tmp_path: Path, value: object) -> None:
    with ShardWriter(tmp_path / "store", 4, {"seed": value, "scale": 2}) as writer:
        writer.append(rows(0, 1))
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"manifest\.json: damaged: seed is .*, expected int") as error:
        store.fact("seed", int)
    assert len(str(error.value)) < 1000
    with pytest.raises(StoreError, match="steps is 'None', expected int"):
        store.fact("steps", int)
    assert store.fact("scale", float) == 2.0
    assert isinstance(store.fact("scale", float), float)


def test_a_store_gives_way_to_an_empty_folder_and_nothing_else_does(tmp_path: Path) -> None:
    write(tmp_path / "store")
    for _ in range(2):
        make_empty(tmp_path / "store")
        assert list((tmp_path / "store").iterdir()) == []
    make_empty(tmp_path / "new" / "store")
    assert (tmp_path / "new" / "store").is_dir()
    (tmp_path / "store" / "cat.png").touch()
    with pytest.raises(StoreError, match="store: exists and holds other things"):
        make_empty(tmp_path / "store")
    (tmp_path / "file").touch()
    for write_to in (make_empty, lambda place: ShardWriter(place, 4, {})):
        with pytest.raises(StoreError, match="file: a file is in the way"):
            write_to(tmp_path / "file")
    assert (tmp_path / "store" / "cat.png").exists()
