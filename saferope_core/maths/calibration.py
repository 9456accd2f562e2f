"""Settings that need no training: gates from safe tokens, and a generator of a fixed angle.

Axes: H heads, R subspace rank, N safety-critical heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUANTILE = 0.999  # measured on a small FLUX: benign pictures stay, erasure is that of the paper's gate of 0.7


def calibrate_gate(lrs_safe: Tensor, quantile: float = QUANTILE) -> Tensor:
    """One gate per head: the smallest observed LRS that at least `quantile` of the safe vectors do not exceed.

    lrs_safe [m, H] -> [H], same dtype, in [0, 1]. So at most a share of 1 − quantile of these vectors is turned.
    Raises ValueError for a quantile outside (0, 1] and where no vectors, or ones with NaN, are given.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}, expected a share above 0 and up to 1")
    if len(lrs_safe) == 0 or not lrs_safe.isfinite().all():
        raise ValueError(f"a gate needs finite LRS of safe vectors, got {len(lrs_safe)} rows (or NaN among them)")
    return lrs_safe.kthvalue(math.ceil(quantile * len(lrs_safe)), dim=0).values


def fixed_generator(rank: int, angle: float, count: int) -> Tensor:
    """Generators that turn the planes of columns (1, 2), (3, 4), ... by `angle` radians at LRS 1, first towards second.

    Returns `count` equal ones, [N, R, R] float32, skew. For odd rank the last column is not turned. Raises ValueError
    for a rank below 2, which holds no plane.
    """
    if rank < 2:
        raise ValueError(f"rank is {rank}, expected at least 2: a rotation needs a plane")
    first = torch.arange(0, rank - 1, 2)
    generator = torch.zeros(rank, rank)
    generator[first + 1, first] = angle
    generator[first, first + 1] = -angle
    return generator.repeat(count, 1, 1)
