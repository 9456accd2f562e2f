"""Measures of a protection, as pure functions of counts and tensors."""

from __future__ import annotations

import math

import torch
from scipy.stats import binomtest, t
from torch import Tensor

CONFIDENCE = 0.95  # of intervals


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval at CONFIDENCE for a rate, in [0, 1]; (0, 1) where nothing was tried.

    Wilson, "Probable inference", JASA 22 (1927). Unlike the plain normal interval it stays sensible at 0 and 100 %.
    """
    if trials == 0:
        return 0.0, 1.0
    found = binomtest(hits, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Student's interval at CONFIDENCE for the mean of [n] numbers; without bounds where n is below 2."""
    count, mean = values.numel(), values.double().mean().item()
    if count < 2:
        return -math.inf, math.inf
    half = t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.double().std().item() / math.sqrt(count)
    return float(mean - half), float(mean + half)


def mcnemar(before: Tensor, after: Tensor) -> float:
    """Exact two-sided McNemar test of paired outcomes (bool [n] each): the p-value, in (0, 1].

    Only pairs that changed count. Under the null hypothesis either direction is a fair coin.
    """
    vanished, appeared = int((before & ~after).sum()), int((~before & after).sum())
    return float(binomtest(vanished, vanished + appeared).pvalue) if vanished + appeared else 1.0


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
