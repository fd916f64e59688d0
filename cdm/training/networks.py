"""The three networks of distribution matching, addressed by role: teacher, student and fake score.

The training step asks for the velocity of a role and never whether the roles are three models or three adapters
of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cdm.errors import CdmError
from cdm.families.base import Family, PromptEmbedding
from cdm.families.common import Conditioning
from cdm.params import Lora
from cdm.randomness import philox
from cdm.training.quantised import quantise
from cdm.training.sharding import Fill, nothing, whole_of
from cdm.training.start import InMemory, Start

Role = Literal["teacher", "student", "fake"]
Trained = Literal["student", "fake"]


class Networks(Protocol):
    """The interface through which the training step uses its three networks."""

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The role's velocity at `x` (batch, ...), level `sigma` (batch,): float32, like `x`."""
        ...

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        """The role's trained parameters by name: none for a fake score that is not there. Those of the student have the
        same names in the fake score."""
        ...

    def casting_once(self) -> AbstractContextManager[object]:
        """Calls within it cast weights to the type of their arithmetic once for all of them, and not each for itself.

        For calls without gradients, between which no weight changes.
        """
        ...

    def backward(self, role: Trained, loss: Tensor) -> None:
        """Adds the loss's gradient to the role's parameters."""
        ...

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        """A student of these `weights`, named as the student's parameters, on the teacher at `source`.

        They are made whole one after the other: where they are sharded, all other processes `lend` theirs.
        """
        ...


def trained_roles(fake: bool) -> tuple[Trained, ...]:
    """The networks that learn, with a `fake` score or without."""
    return ("student", "fake") if fake else ("student",)


class Place(Protocol):
    """Moves a model to a device, or shards it over the devices of several processes, where `fill` gives it those
    parameters that are on the meta device."""

    def __call__(self, model: nn.Module, fill: Fill = nothing, /) -> nn.Module: ...


def stay(model: nn.Module, fill: Fill = nothing, /) -> nn.Module:
    """Leaves the model where it is, on the CPU if it is to be filled."""
    fill(model, torch.device("cpu"))
    return model


def start_from(teacher: nn.Module | Start) -> Start:
    """The start of networks from a `teacher`; one that is loaded becomes one of them."""
    return InMemory(teacher) if isinstance(teacher, nn.Module) else teacher


class FullNetworks:
    """Three models that start as the `teacher`: itself, and two trainable ones in float32, each put in its `place`.

    Without `fake` there is no fake score.
    """

    def __init__(
        self,
        family: Family,
        teacher: nn.Module | Start,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        place: Place = stay,
        fake: bool = True,
    ) -> None:
        self.family = family
        self.autocast = autocast

        start = start_from(teacher)

        def learning() -> nn.Module:
            model = start.build(torch.float32).requires_grad_(True)
            if gradient_checkpointing:
                model.enable_gradient_checkpointing()  # type: ignore[operator]
            return place(model, start.fill)

        trained: dict[str, nn.Module] = {role: learning() for role in trained_roles(fake)}
        frozen = place(start.build(autocast or torch.float32, last=True).requires_grad_(False), start.fill)
        self.models: dict[str, nn.Module] = {"teacher": frozen, **trained}
        for model in self.models.values():
            model.eval()  # no dropout: the rollout and the update must see the same student

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with _precision(self.autocast, x.device):
            return self.family.velocity(self.models[role], x, sigma, conditioning).float()

    def casting_once(self) -> torch.autocast:
        return _precision(self.autocast, _device(self.models["teacher"]))

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return dict(self.models[role].named_parameters()) if role in self.models else {}

    def backward(self, role: Trained, loss: Tensor) -> None:
        loss.backward()

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        student = self.family.empty_transformer(source)
        _check_names(student, weights)
        self.family.save_student(student, source, folder, _whole(weights))


class LevelAwareFake:
    """`networks`, with a fake score that is also conditioned on the noise level at which the student made its data.

    One fake score serves data made from pure noise and data made from nearly clean latents. Without the level
    it learns their mixture, and matching pushes each kind away from the other. The level comes as
    `conditioning["level"]` (batch, 1), as sines that a linear map, zero at first, adds to what the family calls
    the embedding of a prompt. Not in the paper.
    """

    frequencies = 2  # few, smooth in the level: with many, what is learnt at one level helps no other

    def __init__(
        self, networks: Networks, family: PromptEmbedding, like: Conditioning, place: Place = stay
    ) -> None:
        self.networks, self.family = networks, family
        linear = nn.Linear(2 * self.frequencies, family.embedding_width(like))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.map: nn.Module = place(linear)  # as the fake score is, so that both are optimised in one way

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        known = {name: value for name, value in conditioning.items() if name != "level"}
        if role == "fake" and "level" in conditioning:
            octaves = torch.pi * 2.0 ** torch.arange(self.frequencies, device=x.device) / 2
            angles = conditioning["level"] * octaves
            known = self.family.add_embedding(known, self.map(torch.cat([angles.sin(), angles.cos()], dim=1)))
        return self.networks.velocity(role, x, sigma, known)

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        if role == "student":
            return self.networks.parameters(role)
        level = {f"level.{name}": value for name, value in self.map.named_parameters()}
        return self.networks.parameters(role) | level

    def casting_once(self) -> AbstractContextManager[object]:
        return self.networks.casting_once()

    def backward(self, role: Trained, loss: Tensor) -> None:
        self.networks.backward(role, loss)

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        self.networks.save_student(weights, source, folder)


class LoraNetworks:
    """One frozen model with two adapters, `student` and `fake`, in float32; the teacher is the model with none.

    Both adapters start from the same numbers, of `seed`, so that moving one towards the other makes sense from
    the first update on, and start as the teacher: their second factors are zero. Without `fake` there is no fake score,
    and its adapter is not there.
    """

    def __init__(
        self,
        family: Family,
        teacher: nn.Module | Start,
        lora: Lora,
        *,
        seed: int,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        place: Place = stay,
        fake: bool = True,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.family = family
        self.autocast = autocast
        start = start_from(teacher)
        self.model = start.build(autocast or torch.float32, last=True).requires_grad_(False).eval()
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]
        quantise(self.model, lora.base, lambda layer, name: place(layer, partial(start.fill, prefix=name)))
        config = adapter_config(family, self.model, lora)
        self.config, self.scale = _plain(config.to_dict()), lora.alpha / lora.rank
        roles = trained_roles(fake)
        with warnings.catch_warnings():
            # That there is an adapter already is the point of the second.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            for role in roles:
                self.model.add_adapter(config, role)  # type: ignore[operator]
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for role in roles:
            _start(self.model, role, seed)
        self._let_learn([self._adapter(role) for role in roles])
        self.model = place(self.model, start.fill)
        self.adapters = {role: self._adapter(role) for role in roles}

    def _adapter(self, role: Trained) -> dict[str, nn.Parameter]:
        """The parameters of a role's adapter by their names without the role."""
        named = self.model.named_parameters()
        return {name.replace(f".{role}.", "."): value for name, value in named if f".{role}." in name}

    def _let_learn(self, adapters: Iterable[dict[str, nn.Parameter]]) -> None:
        # peft freezes what is not active; but the graph of one role is still there while another is asked, and a
        # parameter that is frozen when its gradient arrives loses it.
        for adapter in adapters:
            for parameter in adapter.values():
                parameter.requires_grad_(True)

    def _activate(self, role: Role) -> None:
        for layer in self.layers:
            if role == "teacher":
                layer.enable_adapters(False)
            else:
                layer.set_adapter([role])
                layer.enable_adapters(True)
        self._let_learn(self.adapters.values())

    def velocity(self, role: Role, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self._activate(role)
        with _precision(self.autocast, x.device):
            return self.family.velocity(self.model, x, sigma, conditioning).float()

    def casting_once(self) -> torch.autocast:
        return _precision(self.autocast, _device(self.model))

    def parameters(self, role: Trained) -> dict[str, nn.Parameter]:
        return self.adapters.get(role, {})

    def backward(self, role: Trained, loss: Tensor) -> None:
        self._activate(role)  # gradient checkpointing runs forwards again
        loss.backward()

    def save_student(self, weights: Mapping[str, Tensor], source: Path, folder: Path) -> None:
        # Some programs never read alpha and take the factors as they are: so these carry the whole strength.
        whole = {name: value * self.scale if ".lora_B." in name else value for name, value in _whole(weights)}
        self.family.save_lora(whole, self.config | {"lora_alpha": self.config["r"]}, folder)


def adapter_config(family: Family, model: nn.Module, lora: Lora) -> Any:
    """Peft's config of the adapters of `model`; raises CdmError if a target is no linear layer of it."""
    from peft import LoraConfig

    targets = family.adapted_layers(model, lora.targets)
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)


def _start(model: nn.Module, role: Trained, seed: int) -> None:
    """The first values of a role's adapter: float32, the first factors as torch starts a linear layer, the second zero.

    They are on the device of the weights that they adapt, or the CPU where these are still to be filled.
    """
    adapter = [(name, value) for name, value in model.named_parameters() if f".{role}." in name]
    for index, (name, value) in enumerate(adapter):
        device = torch.device("cpu") if value.is_meta else value.device
        first = torch.zeros(value.shape, device=device)
        if ".lora_A." in name:
            bound = value.shape[1] ** -0.5
            first.copy_(torch.from_numpy(philox(seed, "lora", index).uniform(-bound, bound, value.shape)))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(first))


def _whole(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each of the weights with its name, whole, when it is asked for."""
    for name, value in weights.items():
        yield name, whole_of(value.detach())


def _check_names(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises CdmError unless the weights are named as the parameters of the model: what is missing would be the
    teacher's."""
    names = {name for name, _ in model.named_parameters()}
    if names != weights.keys():
        other = sorted(names ^ weights.keys())
        raise CdmError(
            f"the student cannot be saved: {len(other)} parameters are not named as the teacher's ({other[0]}): this is"
            " a fault of the code; the checkpoints are kept"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _precision(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config of peft in JSON values that are the same in every process: sets are in random order."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
