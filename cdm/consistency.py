"""Continuous-time consistency (sCM, arXiv 2410.11081) for flow matching, where `x0 = x - sigma * velocity`.

The student's x0 is to be constant along the teacher's flow. Its derivative along the flow, the *tangent*, holds
the derivative of the student's velocity, which forward-mode differentiation gives without a step size.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdm.flow import euler_step, expand
from cdm.rollout import Conditioning, Velocity


@torch.no_grad()
def velocity_change(
    network: Velocity,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    velocity: Tensor,
    flow: Tensor,
    step: Tensor,
) -> Tensor:
    """How fast the network's velocity at (`x`, `sigma`), `velocity`, changes with sigma along `flow`: like `x`.

    Where `step` (batch,) is not 0, the mean over a step of that length towards data, which takes a plain forward.
    Forward-mode differentiation takes about two, and attention in its plain form: no fused kernel has the derivative.
    """
    if step.any():
        before = sigma - step
        change = velocity - network(euler_step(x, flow, sigma, before), before, conditioning)
        return change / expand(step, x)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # torch scripts some of its derivatives when it needs them first, and says of itself that this is old.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        point = forward_ad.make_dual(x, flow), forward_ad.make_dual(sigma, torch.ones_like(sigma))
        change = forward_ad.unpack_dual(network(*point, conditioning)).tangent
    assert change is not None, "the velocity depends on x"
    return change


def consistency_direction(
    velocity: Tensor, velocity_real: Tensor, change: Tensor, sigma: Tensor, step: Tensor, share: float
) -> Tensor:
    """Consistency (sCM, arXiv 2410.11081, section 4), for `x0 = x - sigma * velocity` along a flow `velocity_real`.

    `change` is the derivative of the student's velocity in sigma along the flow, or its mean over a `step` back
    (batch,). The tangent, `d x0 / d sigma = (velocity_real - velocity) - share * (sigma - step) * change`, is
    divided by its root mean square plus 0.1; `share` grows from 0 to 1 (tangent warm-up). It is 0 where the student is
    the flow's consistency function, and at `share` 0 the student learns the flow itself.
    """
    tangent = (velocity_real - velocity) - share * expand(sigma - step, change) * change
    size = tangent.flatten(1).square().mean(1).sqrt() + 0.1
    return torch.nan_to_num(-tangent / expand(size, tangent), nan=0.0, posinf=0.0, neginf=0.0).detach()
