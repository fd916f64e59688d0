"""Weights of a model in its safetensors files: mapped where they are read, written one tensor after the other.

A mapped tensor takes no memory until it is touched, and then such as the system may let go of again. So a model is
read in the type in which it is wanted, or a slice of it alone, and written, without a second copy of it in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, KeysView, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.folder import STEMS, WEIGHTS
from cdm.families.tensor_form import content, layout

LARGEST = "10GB"
"""Size of a file from which weights are split into several, as by diffusers."""


class MappedWeights:
    """The tensors in the safetensors `files`, by the names that a model has for them.

    `rename` turns the names of a mapping, as they are in the files, into the model's, in place. Raises CdmError if a
    file cannot be read.
    """

    def __init__(self, files: Iterable[Path], rename: Callable[[dict[str, str]], object]) -> None:
        self._of: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, safe_open] = {}
        for path in files:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CdmError(
                    f"{path}: not a readable safetensors file ({' '.join(str(error).split())})"
                ) from None
            names = {name: name for name in self._open[path].keys()}  # noqa: SIM118 - not a mapping
            rename(names)
            self._of |= {name: (path, key) for name, key in names.items()}

    def keys(self) -> KeysView[str]:
        """Names of all tensors."""
        return self._of.keys()

    def read(self, name: str, shape: torch.Size, rows: slice | None = None) -> Tensor:
        """The tensor `name`, or some rows of it, on its file's pages: copy it before anything is done to it.

        Raises CdmError if there is none of this `shape`.
        """
        if name not in self._of:
            raise CdmError(f"its weights have no {name}: get the model again")
        path, key = self._of[name]
        found = self._open[path].get_slice(key)
        if tuple(found.get_shape()) != tuple(shape):
            raise CdmError(
                f"{path}: {name} has the shape {tuple(found.get_shape())}, expected {tuple(shape)}: get the model again"
            )
        if rows is not None and rows.start == rows.stop:
            return torch.empty(0, *shape[1:])
        tensor: Tensor = self._open[path].get_tensor(key) if rows is None else found[rows]
        return tensor


Take = Callable[[MappedWeights, str, nn.Parameter, torch.device], Tensor]
"""What a process holds of the weight of that name, in the type of a parameter on the meta device."""


def whole(weights: MappedWeights, name: str, like: nn.Parameter, device: torch.device) -> Tensor:
    """The weight `name`, all of it, on `device` and in the type of the parameter `like`."""
    return weights.read(name, like.shape).to(device, like.dtype, copy=True)


def fill(
    model: nn.Module, weights: MappedWeights, device: torch.device, *, take: Take = whole, prefix: str = ""
) -> None:
    """Gives a model that was built without weights its parameters, those that are on the meta device.

    `prefix` stands before their names in the files, where the model is a part of another. A layer that peft has wrapped
    keeps its weights' names. Raises CdmError if one is missing or has another shape.
    """
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                full = ".".join(part for part in (prefix, path, name) if part).replace(".base_layer.", ".")
                value = take(weights, full, parameter, device)
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def constants(model: nn.Module) -> dict[str, Tensor]:
    """What a model holds beside its parameters, by name: buffers, and tensors that modules keep as plain attributes."""
    found = dict(model.named_buffers())
    for path, module in model.named_modules():
        found |= {f"{path}.{name}": value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return found


def fill_constants(model: nn.Module, weights: MappedWeights) -> None:
    """Sets the constants of a model that are stored beside its weights, such as positions, on the CPU."""
    kept = model.state_dict().keys() & weights.keys()
    for path, module in model.named_modules():
        for name, constant in list(module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            if full in kept:
                setattr(module, name, weights.read(full, constant.shape).to(constant.dtype, copy=True))


def write(
    folder: Path,
    like: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    stem: str = STEMS["diffusers"],
) -> None:
    """Writes a model's `tensors`, in any order, into `folder`, as diffusers would: the same bytes.

    `like` are all of them by name, of which only shapes and types are read. One at a time is asked for, and copied to
    the CPU. `stem` begins the names of the files.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shards = split_torch_state_dict_into_shards(
        dict(like), filename_pattern=f"{stem}{{suffix}}{WEIGHTS}", max_shard_size=LARGEST
    )
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for shard, names in shards.filename_to_tensors.items():
            file: BinaryIO = stack.enter_context((folder / shard).open("wb"))
            header, offsets = layout({name: like[name] for name in names}, {"format": "pt"})
            file.write(header)
            places |= {name: (file, len(header) + offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            file, offset = places.pop(name)
            file.seek(offset)
            file.write(content(tensor.detach().to("cpu", like[name].dtype)))
    assert not places, f"never given: {', '.join(places)}"
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / f"{stem}{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
