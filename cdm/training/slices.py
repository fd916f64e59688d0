"""Slices of sharded tensors on disk: each process writes its own and reads what it needs, by torch's planners.

`torch.distributed.checkpoint` decides who writes what and finds the slices that a process needs, whoever wrote them.
Its own files are pickled; these are safetensors, and what they hold is in their headers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cdm.training.tensor_file import read_header, write_tensors

ENDING = ".safetensors"


def key_of(group: str, name: str) -> str:
    """The name of a tensor among those of all groups."""
    return f"{group}/{name}"


def write_slices(
    folder: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    staged: Mapping[str, Tensor],
    processes: ProcessGroup,
    begin: Callable[[], object],
    finish: Callable[[dict[str, str]], None],
) -> None:
    """Writes this process's slices of the tensors in `groups` into `folder`; all of `processes` must do so.

    What is written is in `staged`, by `key_of`; of `groups` only shapes and places are read. The first process calls
    `begin` before anything is written, and `finish` with the SHA-256 of every file, by name, when all is. An error of
    one process is raised in all.
    """
    tensors = {key_of(group, name): value for group in groups for name, value in groups[group].items()}
    planner = _StagedPlanner(staged)
    try:
        save(tensors, storage_writer=_Writer(folder, begin, finish), planner=planner, process_group=processes)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from error


def read_slices(files: Mapping[Path, str], group: str, into: Mapping[str, Tensor]) -> None:
    """Sets the tensors `into`, or this process's slices of them, to those of their names in a group.

    `files` are all files of the checkpoint with the groups that they belong to. Raises KeyError for a name that is not
    there, ValueError for another shape.
    """
    stored = _metadata({path: of for path, of in files.items() if of == group})
    wanted = {key_of(group, name): value.detach() for name, value in into.items()}
    for key, value in wanted.items():
        found = stored.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        if (found.size, found.properties.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{key} is {found.size} of {found.properties.dtype}, not {value.shape} of {value.dtype}"
            )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # Each process reads alone: it knows which slices it needs.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(wanted, storage_reader=_Reader(stored), planner=planner, no_dist=True)


def shapes_in(files: Mapping[Path, str], group: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and whole shape of each tensor of a group."""
    stored = _metadata({path: of for path, of in files.items() if of == group}).state_dict_metadata
    return {
        key.removeprefix(key_of(group, "")): (entry.properties.dtype, entry.size)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _metadata(files: Mapping[Path, str]) -> Metadata:
    """What the headers of the files say, as torch's planners want it."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, Path] = {}
    for path, group in files.items():
        for name, (dtype, shape, begin) in read_header(path).items():
            key = key_of(group, name)
            entry = tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([0] * len(shape)), [])
            )
            ends = (start + length for start, length in zip(begin, shape, strict=True))
            entry.size = torch.Size(map(max, entry.size, ends))
            entry.chunks.append(ChunkStorageMetadata(begin, shape))
            places[MetadataIndex(key, begin)] = path
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


class _StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors that training goes on to change, and writes the copies of them."""

    def __init__(self, staged: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.staged[write_item.index.fqn]


class _Writer(StorageWriter):
    """A file of safetensors for each group and process: `student-00001-of-00002.safetensors`."""

    def __init__(
        self, folder: Path, begin: Callable[[], object], finish: Callable[[dict[str, str]], None]
    ) -> None:
        self.folder, self.begin, self.end = folder, begin, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.begin()
        return [replace(plan, storage_data=f"{i + 1:05d}-of-{len(plans):05d}") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine it may not be seen yet
        groups: dict[str, dict[str, WriteItem]] = {}
        for item in plan.items:
            group, name = item.index.fqn.split("/", 1)
            groups.setdefault(group, {})[name] = item
        written = []
        for group, items in groups.items():
            tensors, offsets = {}, {}
            for name, item in items.items():
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                assert item.tensor_data is not None
                if tensor.numel():
                    tensors[name], offsets[name] = tensor, item.tensor_data.chunk.offsets
            if tensors:
                path = self.folder / f"{group}-{plan.storage_data}{ENDING}"
                digest = write_tensors(path, tensors, offsets)
                written.append(WriteResult(MetadataIndex(path.name), path.stat().st_size, digest))
        return _done(written)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.end({written.index.fqn: written.storage_data for each in results for written in each})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return True


class _Reader(StorageReader):
    """Reads slices from the mapped files in which they are."""

    def __init__(self, stored: Metadata) -> None:
        self.stored = stored

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.stored

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.stored.storage_data[item.storage_index], []).append(item)
        for path, items in files.items():
            with safe_open(path, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(file, item.storage_index.fqn.split("/", 1)[1], item))
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return True


def _part(file: Any, name: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        return file.get_tensor(name)
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(name)[tuple(slice(start, start + length) for start, length in ranges)]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
