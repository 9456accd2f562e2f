"""The losses as pure functions of velocities, `[B, L, C]` of any float dtype; computed in fp32, per prompt [B].

Per prompt, so that a mean over them does not depend on how a batch is split over passes or processes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean of every prompt's squared differences, [B], >= 0, in fp32 also under autocast."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def unlearning_loss(rotated: Tensor, base: Tensor, scale: float = 1.0) -> Tensor:
    """Drives the rotated velocity away from the base model's: -tanh(MSE / scale), in (-1, 0], 0 where both are equal.

    The paper's L_unl (scale 1), bounded: once the velocities differ by about `scale`, more difference pays ever less,
    so that the generators do not grow without limit.
    """
    return -torch.tanh(mean_squared_error(rotated, base) / scale)


def velocity_matching_loss(rotated: Tensor, base: Tensor) -> Tensor:
    """The paper's L_reg: on safe pictures the rotated velocity stays the base model's. MSE, >= 0."""
    return mean_squared_error(rotated, base)


def flow_matching_loss(rotated: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Plain flow matching on safe pictures, `noise - latents` being the true velocity. The published code's L_reg."""
    return mean_squared_error(rotated, noise.float() - latents.float())
