"""Memory of a network's forward and backward passes, counted on fake tensors, which have shapes and no values.

A pass runs with its true operations, autocast and recomputation, and every storage that comes to life counts until
it is freed. So a tensor that several operations save for the backward pass counts once, and parameters do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdm.planning.architecture import Architecture


@dataclass(frozen=True)
class Footprint:
    """Bytes beside parameters and inputs: `held` after the forwards, `peak` at most."""

    held: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on: those that live `now`, and the `peak`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._alive: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and guarding against it takes longer than the work itself

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most of the calls: autograd asks this of every gradient
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        identity = id(storage)
        if identity in self._seen or identity in self._alive:
            return
        self._alive.add(identity)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, identity, storage.nbytes())

    def _free(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self.now -= size


class Network:
    """A network on fake tensors: how it is built, its inputs for a batch, and how it is called with them.

    As in training, what learns is in float32, and what is frozen in the type of `autocast`, in which it runs if that
    is given, with the rules of CUDA if `cuda`; or in the type `frozen`, in which it runs by itself. `sharded`: what
    learns is gathered in the type in which it runs, so that autocast makes no copies, and each gradient is dropped once
    it is there, as where it goes to its shard.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        inputs: Callable[[int], dict[str, Tensor]],
        call: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        *,
        autocast: torch.dtype | None = None,
        frozen: torch.dtype | None = None,
        sharded: bool = False,
        cuda: bool = True,
    ) -> None:
        self.autocast, self._inputs, self._call = autocast, inputs, call
        with torch.device("meta"):
            self.model = build().eval()
        self.fake = FakeTensorMode()
        with self.fake:
            running = autocast or torch.float32
            _make_fake(self.model, frozen=frozen or running, learning=running if sharded else torch.float32)
        if cuda and autocast is not None:
            _normalise_in_float32(self.model)
        if sharded:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        self._forwards: dict[int, Footprint] = {}

    @classmethod
    def from_architecture(cls, architecture: Architecture, **options: Any) -> Network:
        """The transformer of `architecture`."""
        return cls(architecture.build, architecture.inputs, architecture.velocity, **options)

    def forward(self, batch: int) -> Footprint:
        """A forward of `batch` samples without a graph; counted once."""
        if batch not in self._forwards:
            with self._counting(batch) as (live, run), torch.no_grad():
                output = run()
                held = live.now
                del output
            self._forwards[batch] = Footprint(held, live.peak)
        return self._forwards[batch]

    def update(
        self, graphs: int, batch: int, *, checkpointing: bool = False, accumulates: bool = False
    ) -> Footprint:
        """`graphs` forwards of `batch` samples, kept for one backward through all.

        Gradients count to the peak, unless they were there before and it `accumulates` on them.
        """
        if checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]
        if accumulates:
            with self.fake:
                for parameter in self.model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with self._counting(batch) as (live, run):
            outputs = [run() for _ in range(graphs)]
            held = live.now
            loss = torch.stack([output.sum() for output in outputs]).sum()
            outputs.clear()
            loss.backward()
            self.model.zero_grad()
        if checkpointing:
            self.model.disable_gradient_checkpointing()  # type: ignore[operator]
        return Footprint(held, live.peak)

    @contextmanager
    def _counting(self, batch: int) -> Iterator[tuple[LiveBytes, Callable[[], Tensor]]]:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
                return self._call(self.model, inputs).float()

        with ExitStack() as stack:
            stack.enter_context(self.fake)
            inputs = self._inputs(batch)
            parameters = list(self.model.parameters())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            constants = [*self.model.buffers(), *_unregistered(self.model)]
            known = [*parameters, *gradients, *constants, *inputs.values()]
            live = stack.enter_context(LiveBytes(known))
            yield live, run


def _make_fake(model: nn.Module, *, frozen: torch.dtype, learning: torch.dtype) -> None:
    """Puts fake tensors on the CPU in the place of a meta model's parameters and constants."""
    buffers = torch.float32 if all(parameter.requires_grad for parameter in model.parameters()) else frozen
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            dtype = learning if value.requires_grad else frozen
            fake = torch.empty(value.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            dtype = buffers if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=dtype))
        for name, constant in list(vars(module).items()):
            if isinstance(constant, Tensor):
                setattr(module, name, torch.empty(constant.shape, dtype=constant.dtype))


def _unregistered(model: nn.Module) -> list[Tensor]:
    """Constants that a model keeps as plain attributes, such as Qwen-Image's complex rotations."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _normalise_in_float32(model: nn.Module) -> None:
    """Gives normalisations the rule that CUDA's autocast has for them, and the CPU's has not."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            setattr(module, "forward", partial(_float32_norm, module))  # noqa: B010 - on the instance, not the class


def _float32_norm(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    shape = list(norm.normalized_shape)
    values = (getattr(norm, name, None) for name in ("weight", "bias"))
    weight, bias = (None if value is None else value.float() for value in values)
    with torch.autocast("cpu", enabled=False):
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(x.float(), shape, weight, norm.eps)
        return F.layer_norm(x.float(), shape, weight, bias, norm.eps)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
