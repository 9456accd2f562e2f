"""The attention patch in a graph of torch.compile: one operator a block, so that no graph breaks.

The patch works when the operator runs, in every replay: it notes the block for the audit, checks the vectors, turns and
records. The graph holds no patch, but a place in the chain of SafeRoPE's patches. A replayed graph asks the patches of
the forward that runs it. In a forward without patches it turns nothing.

Axes: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Chains(threading.local):
    """The patches of the forward that a thread is in, in the order in which blocks call them."""

    def __init__(self) -> None:
        self.now: Sequence[Any] = ()


_chains = _Chains()


@contextmanager
def chained(patches: Sequence[Any]) -> Iterator[None]:
    """While it lasts, `turn` asks these patches."""
    before, _chains.now = _chains.now, patches
    try:
        yield
    finally:
        _chains.now = before


# A CUDA graph would replay the kernels without the audit; inductor cuts its CUDA graphs at this operator
@torch.library.custom_op("saferope::patch", mutates_args=("q", "k"), tags=(torch.Tag.cudagraph_unsafe,))
def turn(q: Tensor, k: Tensor, place: int, kind: str, index: int, text: int, total: int, placed: bool) -> None:
    """Turns q and k [B, H, L, D] of a block in place, by the patch at this place of the chain, if there is one.

    text, total: ComfyUI's img_slice; placed: whether rotary positions come with them.
    """
    if place < len(_chains.now):
        _chains.now[place].turn_in_place(q, k, (kind, index), [text, total], placed)


@turn.register_fake
def _(q: Tensor, k: Tensor, place: int, kind: str, index: int, text: int, total: int, placed: bool) -> None:
    return None
