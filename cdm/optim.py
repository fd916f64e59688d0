"""What learns: AdamW on one role's parameters, with its learning-rate schedule, clipping and averaging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from cdm.params import Optimiser
from cdm.sharding import assign, is_sharded, whole_of


def learning_rate(settings: Optimiser, update: int, updates: int) -> float:
    """The rate of update `update` (from 0) of `updates`: a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, (update + 1) / settings.warmup) if settings.warmup else 1.0
    left, falling = updates - update, updates - settings.decay_from * updates
    fall = min(1.0, left / falling) if falling else 1.0
    return settings.lr * rise * fall


@torch.no_grad()
def blend(target: Iterable[Tensor], source: Iterable[Tensor], share: float) -> None:
    """`target <- (1 - share) * target + share * source`, in place."""
    torch._foreach_lerp_(list(target), list(source), share)


def ema_decay(decay: float, update: int) -> float:
    """The moving average's decay at update `update` (from 0), ramped: `min(decay, (1 + s) / (10 + s))`."""
    return min(decay, (1 + update) / (10 + update))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean of each gradient over the processes, in one message.

    Nothing is left to do where there is one process, or the backward pass has done it, slice by slice.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    if any(is_sharded(parameter) for parameter in parameters):
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scales all gradients so that their common norm is at most `limit`; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole_of(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


class Learner:
    """AdamW on named parameters; `updates_done` counts its steps."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser, updates: int) -> None:
        self.parameters = parameters
        self.settings = settings
        self.updates = updates
        self.updates_done = 0
        values = list(parameters.values())
        self.adamw = torch.optim.AdamW(
            values,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=values[0].device.type in ("cpu", "cuda"),
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self.settings, self.updates_done, self.updates)

    def step(self) -> float:
        """One update with the accumulated gradients, which it clears; returns their norm before clipping."""
        parameters = list(self.parameters.values())
        average_gradients(parameters)
        norm = clip_gradients(parameters, self.settings.clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        self.adamw.zero_grad()
        self.updates_done += 1
        return norm

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, keyed `moment/parameter`."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor], updates_done: int) -> None:
        """Restores `state()` after `updates_done` updates."""
        self.updates_done = updates_done
        for key, value in state.items():
            moment, name = key.split("/", 1)
            parameter = self.parameters[name]
            if moment == "step":
                mine = value.to(parameter.device)
            else:
                mine = torch.zeros_like(parameter, requires_grad=False)
                assign(mine, value)
            self.adamw.state[parameter][moment] = mine
