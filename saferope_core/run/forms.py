"""Which form turns the vectors of a block: the same turn, written for a CPU, for a GPU, and for gradients.

    gathered   on a CPU: only the few vectors that may turn (`few`), in exact arithmetic (`dense`)
    dense      where gradients are kept: all vectors, in exact arithmetic
    fused      on a GPU with Triton: one kernel (`fused`)
    plain      on any other device, and in float64: ten PyTorch kernels (`plain`)

Axes: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, Protocol

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
PACKED = ("fused", "plain")  # forms that read a Packed instead of a Plan
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Seen(Protocol):
    """Receives the tokens above the gates, for each concept with gates below 1 there: `recorder.Forward`. A key head
    that query heads share counts as the first of them."""

    def saw(self, concept: int, row: int, stream: str, heads: Tensor, passed: Tensor) -> None:
        """A block's row, the stream, its heads [n], and the tokens above their gates, bool [B, n, L]."""

    def room(self, gates: tuple[tuple[int, int], ...], stream: str, like: Tensor) -> Tensor:
        """Float32 [C, B, L], on the device of `like` [B, H, L, D]: a kernel adds there how many of a concept's gates
        each token passes. gates: each concept's number, and how many gates are asked."""

    def wants_heads(self, stream: str) -> bool:
        """Whether `saw_heads` is to be told, after a kernel has counted."""

    def saw_heads(self, concept: int, row: int, heads: Tensor, passed: Tensor) -> None:
        """As `saw`, of tokens that are counted already."""


class Told(NamedTuple):
    """Where a block's stream is told of."""

    seen: Seen
    row: int
    stream: str
    group: int  # query heads to a head

    def of(self, heads: Tensor) -> Tensor:
        """The heads as `Seen` counts them."""
        return heads if self.group == 1 else heads * self.group

    def saw(self, concept: int, heads: Tensor, passed: Tensor) -> None:
        self.seen.saw(concept, self.row, self.stream, self.of(heads), passed)


def form_of(x: Tensor) -> Form:
    """The form for queries or keys x [B, H, L, D].

    On a CPU the few tokens above a gate are gathered, which saves nearly all the work. To find them on a GPU would cost
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
    counts = None if told is None else told.seen.room(_asked(plan), told.stream, tokens)
    heads = told is not None and told.seen.wants_heads(told.stream)
    passed = _fused(tokens, plan, counts, heads) if form == "fused" else _plain(tokens, plan, counts)
    if told is not None and heads and passed is not None:
        for concept, turning, seen in plan.asked(passed):
            told.seen.saw_heads(concept, told.row, told.of(turning), seen)
    return result


def _asked(plan: Packed) -> tuple[tuple[int, int], ...]:
    return tuple((concept, len(heads)) for concept, heads, _ in plan.gates)


def _fused(tokens: Tensor, plan: Packed, counts: Tensor | None, heads: bool) -> Tensor | None:
    """Turns, adds to `counts`, and returns which heads turn which tokens, bool [B, H, L, C], where that is asked."""
    from .fused import turn_fused

    shape = tokens.shape[0], len(plan.heads), tokens.shape[2], plan.cut.shape[1]
    passed = torch.empty(shape, dtype=torch.uint8, device=tokens.device) if heads else None
    turn_fused(tokens, plan, counts, passed)
    return None if passed is None else passed.view(torch.bool)


def _plain(tokens: Tensor, plan: Packed, counts: Tensor | None) -> Tensor | None:
    """As `_fused`."""
    above = turn_plain(tokens, plan)
    if counts is None or not above:
        return None
    passed = (torch.stack(above) if len(above) > 1 else above[0][None]).gt(0)
    counts.add_(passed.sum(1, dtype=counts.dtype).movedim(-1, 0))
    return passed


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
                told.saw(part.concept, plan.heads[part.own], passed.index_select(1, part.own))
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
