"""Numbers that say what a protection does, as pure functions of counts and tensors."""

from __future__ import annotations

import math

import torch
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


def pixel_differences(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of pictures in [-1, 1], [n, 3, h, w]: mean absolute difference in grey levels,
    of 255 as files have."""
    return (a.float() - b.float()).abs().flatten(1).mean(1) * 127.5


def pixel_difference(a: Tensor, b: Tensor) -> float:
    """The mean of `pixel_differences` over all pairs."""
    return pixel_differences(a, b).mean().item()


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel Inception distance of features [n, F] and [m, F], n and m at least 2: unbiased, so below 0 now and then.

    Squared maximum mean discrepancy under the kernel (x·y / F + 1)³, over all pairs at once (Binkowski et al., 2018).
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def fid(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features [n, F] and [m, F], n and m at least 2 (Heusel et al., 2017).

    ‖μa − μb‖² + tr(Ca + Cb − 2 (Ca Cb)^½). The last trace is the sum of the singular values of XaᵀXb, with C = XXᵀ for
    the centred features: the same number without a root of a singular matrix.
    """
    means, roots = [], []
    for features in (a.double(), b.double()):
        means.append(features.mean(0))
        roots.append((features - means[-1]).T / math.sqrt(len(features) - 1))
    spread = sum(root.square().sum() for root in roots)
    shared = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return max(0.0, ((means[0] - means[1]).square().sum() + spread - 2 * shared).item())


def rate(hits: Tensor) -> float:
    """Share of True in a bool tensor, in [0, 1]; 0 where it is empty."""
    return hits.float().mean().item() if hits.numel() else 0.0
