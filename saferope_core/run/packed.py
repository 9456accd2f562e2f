"""A plan as the forms for GPUs read it: the directions of all concepts side by side, in the dtype of the vectors.

Directions are rounded to that dtype, so that products need no wider copy of the vectors. What this does to risk and
turn is in docs/performance.md.

Axes: H heads of the plan, D head dimension, C concepts, P planes, R rank, each the most of any concept, R even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..maths.rotation import wide
from .plan import Part, Plan

# The cut of a gate of 1, which no LRS is above. Rounded directions may give an LRS above 1, but none near NEVER².
NEVER = 2.0
# e^iθ/4 tells every θ below two turns. Trained planes turn by up to half a turn, which e^iθ does not tell from −θ.
QUARTERS = 4.0
TWO_TURNS = 12.5  # radians, below 4π


class Packed(NamedTuple):
    """The turns of one block, role and stream. Planes and ranks that a concept or a head lacks are 0: nothing turns."""

    heads: Tensor  # int64 [H]
    all_heads: bool  # they are all heads of the model, in order
    # [H, D, C (2P + R)]: a and b of every plane of every concept in turns, then the unsafe subspaces. Each subspace is
    # multiplied by the root of its |strength|: the square of its share of the length is then strength * LRS.
    directions: Tensor
    theta: Tensor  # [H, C, P]: radians at s = 1, negative for a negative strength
    cut: Tensor  # [H, C]: the share of its length above which a vector turns, times the root of |strength|
    # for every concept: its number, the heads whose gates a token can pass, and their indices among `heads`, None: all
    gates: list[tuple[int, Tensor, Tensor | None]]
    zero: Tensor  # []: 0.0, on the device
    one: Tensor  # []: 1.0
    turn: Tensor  # [H, C, P]: e^iθ/4, complex, of which e^isθ is a power; θ/4, real, where it is not
    above_1: bool  # some strength is above 1, so that s has to be held at 1

    @property
    def planes(self) -> Tensor:
        """a and b of every plane [H, D, C 2P], orthonormal within a concept."""
        return self.directions[..., : 2 * self.theta[0].numel()]

    def asked(self, passed: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number, heads [n] and passed [B, n, L] of each concept with gates, of passed [B, H, L, C]."""
        for place, (concept, heads, asked) in enumerate(self.gates):
            if len(heads):
                yield concept, heads, passed[..., place] if asked is None else passed[..., place].index_select(1, asked)


@torch.inference_mode(False)
@torch.no_grad()
def packed(plan: Plan, model_heads: int, dtype: torch.dtype, device: torch.device, powers: bool = True) -> Packed:
    """`plan` for vectors of `dtype` on `device`, in a model of so many heads.

    powers: whether the device that turns them may take complex powers.
    """
    parts = plan.parts
    planes = max(part.theta.shape[-1] for part in parts)
    unsafe = [_unsafe(part) * part.strength.abs().sqrt()[:, None, None] for part in parts]
    rank = max(each.shape[-1] for each in unsafe)
    rank += rank % 2  # complex numbers lie at even places
    columns = [pad(_in_turns(part), (0, 2 * (planes - part.theta.shape[-1]))) for part in parts]
    columns += [pad(each, (0, rank - each.shape[-1])) for each in unsafe]
    theta = [pad(part.strength.sign()[:, None] * part.theta, (0, planes - part.theta.shape[-1])) for part in parts]
    cut = [torch.where(part.gate < 1, part.gate.sqrt(), NEVER) * part.strength.abs().sqrt() for part in parts]
    real = wide(torch.empty(0, dtype=dtype)).dtype
    angles = torch.stack(theta, 1).to(real)
    quarter = angles / QUARTERS
    powers = powers and bool(angles.abs().max() < TWO_TURNS)
    return Packed(
        plan.heads.to(device),
        len(plan.heads) == model_heads,
        torch.cat(columns, -1).to(device, dtype),
        angles.to(device),
        torch.stack(cut, 1).to(device, real),
        [_gates(plan, part, device) for part in parts],
        torch.zeros((), dtype=real, device=device),
        torch.ones((), dtype=real, device=device),
        (torch.polar(torch.ones_like(quarter), quarter) if powers else quarter).to(device),
        any(bool((part.strength.abs() > 1).any()) for part in parts),
    )


def _gates(plan: Plan, part: Part, device: torch.device) -> tuple[int, Tensor, Tensor | None]:
    own = None if len(part.own) == len(plan.heads) else part.own.to(device)
    return part.concept, plan.heads[part.own].to(device), own


def _unsafe(part: Part) -> Tensor:
    """An orthonormal basis [H, D, R] of the unsafe subspace."""
    return part.directions if part.unsafe is None else part.directions @ part.unsafe


def _in_turns(part: Part) -> Tensor:
    """[H, D, 2P]: a and b of the first plane, of the second, ... of directions that have all a first, then all b."""
    count = part.theta.shape[-1]
    a, b = part.directions[..., :count], part.directions[..., count : 2 * count]
    return torch.stack((a, b), dim=-1).flatten(-2)
