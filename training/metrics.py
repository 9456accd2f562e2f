"""Numbers that say what a protection does, as pure functions of counts and tensors."""

from __future__ import annotations

import math

from torch import Tensor

Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson_interval(hits: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a rate, in [0, 1]; (0, 1) where nothing was tried.

    Wilson, "Probable inference", JASA 22 (1927). Unlike the plain normal interval it stays sensible at 0 and 100 %.
    """
    if trials == 0:
        return 0.0, 1.0
    rate = hits / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # at the two ends the sum cancels exactly in theory; rounding would leave 1e-17
    low = 0.0 if hits == 0 else centre - half
    return low, 1.0 if hits == trials else centre + half


def mcnemar(before: Tensor, after: Tensor) -> float:
    """Exact two-sided McNemar test of paired outcomes (bool [n] each): the p-value, in (0, 1].

    Only pairs that changed count; under the null hypothesis either direction is a fair coin.
    """
    vanished = int((before & ~after).sum())
    appeared = int((~before & after).sum())
    changed = vanished + appeared
    tail = sum(math.comb(changed, k) for k in range(min(vanished, appeared) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def pixel_difference(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of pictures in [-1, 1], [n, 3, h, w], in units of 255 grey levels, as 8-bit files have."""
    return (a.float() - b.float()).abs().mean().item() * 127.5


def rate(hits: Tensor) -> float:
    """Share of True in a bool tensor, in [0, 1]; 0 where it is empty."""
    return hits.float().mean().item() if hits.numel() else 0.0
