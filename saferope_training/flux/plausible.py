"""Refuses weights of an implausible size: a scale was lost or taken twice, or there is overflow or NaN."""

from __future__ import annotations

from statistics import median

import torch
from torch import nn

# A linear layer's gain is the RMS of W x over that of x, for random x. PyTorch's initialisation, U(-1, 1) / sqrt(in)
# (torch.nn.Linear), has 0.58 at every width; the trained layers of the tiny world have 0.20 to 1.18. fp8's largest
# value is 448 (arXiv 2209.05433), and scaled files use all of it: without scale a layer of FLUX.1's width has 4,800.
LARGEST_GAIN = 256.0
SMALLEST_GAIN = 1 / LARGEST_GAIN  # of most layers: single ones may be zero
_VECTORS = 4


@torch.no_grad()
def gains(network: nn.Module) -> dict[str, float]:
    """Linear layer of any quantised kind -> its gain, estimated with four random vectors."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            x = torch.randn(_VECTORS, layer.in_features, generator=generator)
            x = torch.cat([x, torch.zeros_like(x)])  # zeros show the bias
            place = next(layer.parameters()).device
            y, bias = layer(x.to(place, _dtype(layer))).float().chunk(2)
            found[name] = ((y - bias).square().mean() / x[:_VECTORS].square().mean()).sqrt().item()
    return found


def require_plausible(network: nn.Module, name: str) -> None:
    """ValueError where a linear layer's gain is above LARGEST_GAIN or not a number, or most are below SMALLEST_GAIN."""
    found = gains(network)
    wild = {layer: gain for layer, gain in found.items() if not gain <= LARGEST_GAIN}  # NaN is not
    what = "a scale was lost or taken twice, or the file is broken: fetch it again, or name the model in bf16"
    if wild:
        layer, gain = max(wild.items(), key=lambda each: each[1])
        raise ValueError(
            f"model {name!r}: got a gain of {gain:,.4g} in {layer} ({len(wild)} of {len(found)} linear layers out of "
            f"range), expected at most {LARGEST_GAIN:g}; {what}"
        )
    if found and median(found.values()) < SMALLEST_GAIN:
        raise ValueError(
            f"model {name!r}: got a gain of {median(found.values()):.2g} in the middle one of {len(found)} linear "
            f"layers, expected at least {SMALLEST_GAIN:.2g}; {what}"
        )


def _dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that the layer computes in. The 8-bit values of a quantised weight do not show it."""
    said = (getattr(layer, "compute_dtype", None), layer.weight.dtype, getattr(layer.bias, "dtype", None))
    wide = (dtype for dtype in said if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1)
    return next(wide, torch.get_default_dtype())
