"""Which form turns the vectors of a block: the same turn, written for a CPU, for a GPU, and for gradients.

    gathered   on a CPU: only the few vectors that may turn (`few`), in exact arithmetic (`dense`)
    dense      where gradients are kept: all vectors, in exact arithmetic
    fused      on a GPU with Triton: one kernel (`fused`)
    plain      on any other device, and in float64: a dozen PyTorch kernels (`plain`)

Axes: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..maths.rotation import wide
from .dense import scales_of, turned
from .few import few_candidates
from .packed import Packed
from .plain import turn_plain
from .plan import Plan

Form = Literal["gathered", "dense", "fused", "plain"]
Span = tuple[int, int]  # first token and the one behind the last
Told = Callable[[int, Tensor, Tensor], None]  # concept, heads, passed, of one block and stream
PACKED = ("fused", "plain")  # forms that read a Packed instead of a Plan
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def form_of(x: Tensor) -> Form:
    """The form for queries or keys x [B, H, L, D].

    On a CPU the few tokens above a gate are gathered, which saves nearly all the work; to find them on a GPU would cost
    a synchronisation per block and shapes that depend on the data.
    """
    if x.device.type == "cpu":
        return "gathered"
    if x.requires_grad:
        return "dense"
    fits = x.device.type == "cuda" and x.dtype in FUSED_DTYPES and x.stride(-1) == 1
    return "fused" if fits and _has_triton(x.device) else "plain"


def turn_packed(
    form: Form, x: Tensor, result: Tensor, plan: Packed, span: Span, told: Told | None, own: bool
) -> Tensor:
    """`result` (x, or a copy of it) with the span's tokens turned by a form of PACKED; a copy, unless x is `own`."""
    result = x.clone() if result is x and not own else result
    tokens = result[:, :, slice(*span)]
    if form == "fused":
        from .fused import turn_fused

        scale = turn_fused(tokens, plan, told is not None)
    else:
        scales = turn_plain(tokens, plan)
        scale = torch.stack(scales) if scales and told is not None else None
    if told is not None and scale is not None:
        for place, (concept, heads, asked) in enumerate(plan.gates):
            if len(heads):
                passed = scale[..., place].ne(0)
                told(concept, heads, passed if asked is None else passed.index_select(1, asked))
    return result


def turn_exact(form: Form, x: Tensor, result: Tensor, plan: Plan, span: Span, told: Told | None, own: bool) -> Tensor:
    """As `turn_packed`, by the other forms; `result` itself where nothing turns."""
    tokens = x[:, :, slice(*span)]
    few = few_candidates(tokens, plan) if form == "gathered" else None
    vectors = wide(tokens.index_select(1, plan.heads)) if few is None else few.gather(tokens, plan.heads)
    scales, coordinates = scales_of(vectors, plan)
    if told is not None:
        for part, scale in zip(plan.parts, scales, strict=True):
            if len(part.own):
                passed = scale.ne(0) if few is None else few.spread(scale.ne(0), tokens.shape[2])
                told(part.concept, plan.heads[part.own], passed.index_select(1, part.own))
    if few is not None and not any(bool(scale.any()) for scale in scales):
        return result
    vectors = turned(vectors, plan.parts, scales, coordinates).to(x.dtype)
    result = x.clone() if result is x and not own else result
    if few is None:
        result[:, :, slice(*span)].index_copy_(1, plan.heads, vectors)
    else:
        few.put(vectors, result[:, :, slice(*span)], plan.heads)
    return result


@cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is there and compiles for this GPU: NVIDIA's since Ampere (bf16), AMD's since CDNA."""
    try:
        from . import fused  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
