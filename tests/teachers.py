"""Teachers that are not as they should be, or lie otherwise: copies of pipelines whose tensors, files and rights are
changed."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def weights(folder: Path, part: str) -> Path:
    """The file of a part's weights, of which there is one."""
    (path,) = (folder / part).glob("*.safetensors")
    return path


def change(path: Path, changed: Callable[[Tensors], Tensors]) -> None:
    """Writes other tensors in the place of those of a file."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(
        {name: value.contiguous() for name, value in changed(tensors).items()}, path, metadata={"format": "pt"}
    )


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def poison(folder: Path, part: str) -> str:
    """Makes a number of a part's weights NaN; the name of its tensor, which every use of the part goes through."""
    path = weights(folder, part)
    name = max(name for name in load_file(path) if not name.startswith("encoder"))  # of an autoencoder

    def poisoned(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[0] = float("nan")
        return tensors

    change(path, poisoned)
    return name


def lock(folder: Path) -> None:
    """Takes the right to write from a folder and all that is in it, as DVC and others do."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def unlock(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def rights_that_bind() -> Iterator[None]:
    """The rights of files bind this thread, also where tests run as root."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, kept = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, kept) == 0
    none = (ctypes.c_uint32 * 6)(*kept)
    none[0] = none[3] = 0  # what is effective
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


def rename(path: Path, variant: str) -> None:
    path.rename(path.with_name(f"{path.stem}.{variant}{path.suffix}"))


def shard(folder: Path, part: str, variant: str = "", legacy: bool = False) -> None:
    """Writes the weights of a part as two files with their index."""
    path = weights(folder, part)
    tensors, stem = load_file(path), path.stem
    path.unlink()
    dot = f".{variant}" if variant else ""
    first, second = (
        f"{stem}-0000{k}-of-00002{dot}.safetensors" if legacy else f"{stem}{dot}-0000{k}-of-00002.safetensors"
        for k in (1, 2)
    )
    names = sorted(tensors)
    placed = dict.fromkeys(names[::2], first) | dict.fromkeys(names[1::2], second)
    for file in (first, second):
        inside = {name: tensors[name] for name, place in placed.items() if place == file}
        save_file(inside, folder / part / file, metadata={"format": "pt"})
    index = f"{stem}.safetensors{dot}.index.json" if legacy else f"{stem}.safetensors.index{dot}.json"
    (folder / part / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def clutter(folder: Path) -> None:
    """Puts into a pipeline what hubs have beside one, and what belongs to no pipeline."""
    for name in (
        "flux1-dev.safetensors",
        "sd3_medium.ckpt",
        "README.md",
        "LICENSE",
        "config.json",
        "pipeline.py",
        "onnx/model.onnx",
        "onnx/config.json",
        ".cache/huggingface/x.json",
        "transformer/onnx/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/modeling.py",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.bf16.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/pytorch_model.bin",
        "text_encoder/pytorch_model.bin.index.json",
        "text_encoder/flax_model.msgpack",
        "text_encoder/.gitattributes",
        "text_encoder_9/config.json",
        "text_encoder_9/model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not loaded")
