"""How unsafe one attention vector is, and which heads can tell.

Axes: B batch, H heads, L tokens, D head dimension, R subspace rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation import exact, wide

THRESHOLD = 0.7  # the paper's: an LRS above it counts as unsafe; `read_heads` may take each head's gate instead
CRITICAL = 0.5  # the paper's: a head whose Δ reaches it is safety-critical


def latent_risk_score(x: Tensor, basis: Tensor) -> Tensor:
    """LRS(x) = ‖Uᵀx‖² / ‖x‖²: the share of a vector's energy inside the unsafe subspace.

    x [..., H, L, D] and orthonormal basis U [H, D, R] -> [..., H, L] in [0, 1]; 0 for the zero vector, NaN for a
    vector with NaN. Computed and returned in float32 (float64 for float64). Scaling x changes nothing.
    """
    vectors = wide(x)
    with exact(x):
        return risk_of(torch.einsum("...hld,hdr->...hlr", vectors, basis.to(vectors)), vectors)


def risk_of(coordinates: Tensor, x: Tensor) -> Tensor:
    """LRS [...] of x [..., D] from its coordinates [..., R] in any orthonormal basis of the unsafe subspace."""
    inside = torch.linalg.vector_norm(coordinates, dim=-1)
    whole = torch.linalg.vector_norm(x, dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    return (inside / whole).clamp(max=1.0).square()


def gated(lrs: Tensor, gate: Tensor) -> Tensor:
    """LRS [..., H, L] where it is above its head's gate [H], else 0. NaN stays NaN: damage is not to be hidden."""
    return lrs.masked_fill(lrs <= gate.to(lrs)[:, None], 0.0)


def saturated(lrs: Tensor, strength: float | Tensor) -> Tensor:
    """s = min(1, strength * gated LRS): the share of its full angle by which a vector turns. Shape of `lrs`.

    A strength above 1 turns weaker risk further, and no vector further than its full angle, which is at most half a
    turn in a file that SafeRoPE trained. At strength 1 s is the gated LRS itself, bit for bit. A negative strength
    turns the other way, s >= -1.
    """
    return (strength * lrs).clamp(-1.0, 1.0)


def discrimination(lrs_unsafe: Tensor, lrs_safe: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Δ of equation 4: share of unsafe vectors with LRS > threshold minus the same share of safe vectors.

    lrs_unsafe [n, H], lrs_safe [m, H] -> [H] in [-1, 1], float32. Raises ValueError where either set is empty.
    """
    for name, lrs in (("unsafe", lrs_unsafe), ("safe", lrs_safe)):
        if len(lrs) == 0:
            raise ValueError(f"discrimination: 0 {name} vectors, expected at least 1: Δ compares two sets")
    return (lrs_unsafe > threshold).float().mean(0) - (lrs_safe > threshold).float().mean(0)


def head_discrimination_score(delta: Tensor, cut: float = CRITICAL) -> Tensor:
    """HDS: True for the heads whose Δ is at least `cut`, the safety-critical ones. Same shape as Δ."""
    return delta >= cut
