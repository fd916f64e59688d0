"""Flow-matching arithmetic (paper, section 2): sigma = 0 is data, sigma = 1 is noise.

`x_sigma = (1 - sigma) * x0 + sigma * noise` and `velocity = noise - x0`. Tensors are (batch, ...), `sigma` is
(batch,) and broadcasts over the rest. A `sigma` of lower precision never lowers that of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` (batch,) as (batch, 1, ...), with as many dimensions as `like`.

    Raises ValueError if `sigma` is neither a scalar nor one level a sample.
    """
    if sigma.ndim == 0:
        return sigma
    if sigma.shape != like.shape[:1]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}, expected ({like.shape[0]},): one level a sample"
        )
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at level `sigma` between data and noise: `(1 - sigma) * x0 + sigma * noise`."""
    level = expand(sigma, x0)
    return (1 - level) * x0 + level * noise


def renoise_coefficients(sigma: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of `renoise`: `A = (1 - level) / (1 - sigma)`, `B^2 = level^2 - A^2 sigma^2`."""
    scale = (1 - level) / (1 - sigma)
    return scale, (level**2 - (scale * sigma) ** 2).sqrt()


def renoise(x: Tensor, noise: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
    """The point at the noisier `level` above `x` at level `sigma`: `A x + B noise`; of data it is `add_noise`.

    Where `x` is `add_noise(x0, e, sigma)` the result has the distribution of `add_noise(x0, e, level)` given x0.
    """
    scale, spread = renoise_coefficients(expand(sigma, x), expand(level, x))
    return scale * x + spread * noise


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data predicted from `x` at level `sigma`: `x - sigma * velocity`."""
    return x - expand(sigma, x) * velocity


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The velocity at `x` that leads to `x0`, `(x - x0) / sigma`; `sigma` must not be 0."""
    return (x - x0) / expand(sigma, x)


def velocity_to_noise(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise predicted from `x` at level `sigma`: `x + (1 - sigma) * velocity`."""
    return x + (1 - expand(sigma, x)) * velocity


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One deterministic step along the flow, from level `sigma` to `next_sigma` (either may be the higher)."""
    return x + expand(next_sigma - sigma, x) * velocity


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """The teacher's timestep shift, `shift * sigma / (1 + (shift - 1) * sigma)`; keeps 0 and 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def unshift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_sigmas`."""
    return sigmas / (shift - (shift - 1) * sigmas)


def inference_sigmas(num_steps: int, shift: float) -> Tensor:
    """The levels at which a sampler of `num_steps` evaluates the network: (num_steps,), float32, shifted.

    Before the shift they are 1, 1 - 1/n, ..., 1/n, so that the last step goes from 1/n to data; diffusers'
    default differs (its last level is nearly 0), so pass these explicitly.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    return shift_sigmas(torch.arange(num_steps, 0, -1, dtype=torch.float32) / num_steps, shift)
