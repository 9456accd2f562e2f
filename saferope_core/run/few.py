"""Finds the few tokens that may turn by a cheap look at all, so that only the few need exact arithmetic. For CPUs.

The look computes norms alone, in float32 and piece by piece: widened copies never leave the processor's cache. It sums
in another order than the exact form, so it may round otherwise. Therefore it asks for less than the gate, by a margin
that bounds the rounding. It thus never misses a token that the exact form would turn. The exact form does not turn the
few tokens that the look takes in needlessly.

The margin. Let u be the unit roundoff, n = D + 2. In any order of summation, a product of n terms is off by at
most n u ‖x‖ (Cauchy-Schwarz, orthonormal directions). W products together are off by √W n u ‖x‖, and a norm of n terms
by a factor 1 ± n u. So ‖Uᵀx‖ / ‖x‖ is off by less than n (√W + 2) u, to first order, in the look and in the exact form.
`margin` is twice the sum of both: for terms of second order, for the rounded basis, and for the reach's second product.

Axes: B batch, H heads, L tokens, D head dimension, W directions of all concepts, K most candidates of any head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..maths.rotation import exact, wide
from .plan import Part, Plan

PIECE = 2**19  # numbers, 2 MB of fp32: a core's share of cache. Half and twice as much take as long.
FEW = 0.25  # of all tokens and heads. Beyond it the gathering takes longer than it saves.
SMALLEST, LARGEST = 1e-15, 1e18  # norms beyond which squares come near float32's limits, and no margin is proven


class Few(NamedTuple):
    """Candidates, n in number: `batch`, `head` (in the plan's order), `token` of each, and `slot`, its place in its
    head.
    """

    batch: Tensor
    head: Tensor
    token: Tensor
    slot: Tensor

    def gather(self, span: Tensor, heads: Tensor) -> Tensor:
        """The candidates' vectors of span [B, H of the model, L, D], widened: [B, H, K, D],
        0 where a head has fewer."""
        chosen = wide(span[self.batch, heads[self.head], self.token])
        most = int(self.slot.max()) + 1 if len(self.slot) else 0
        empty = chosen.new_zeros(span.shape[0], len(heads), most, span.shape[3])
        return empty.index_put((self.batch, self.head, self.slot), chosen)

    def spread(self, passed: Tensor, tokens: int) -> Tensor:
        """bool [B, H, K] of the candidates as [B, H, L]; False for all others."""
        full = passed.new_zeros(*passed.shape[:2], tokens)
        full[self.batch, self.head, self.token] = passed[self.batch, self.head, self.slot]
        return full

    def put(self, vectors: Tensor, span: Tensor, heads: Tensor) -> None:
        """Writes the candidates' vectors [B, H, K, D] into span."""
        span[self.batch, heads[self.head], self.token] = vectors[self.batch, self.head, self.slot]


def few_candidates(span: Tensor, plan: Plan) -> Few | None:
    """The tokens of span [B, H of the model, L, D] that may pass a gate of some part; None if they are not few."""
    # by pictures: of several, a product would copy all of span first
    maybe = torch.cat([_maybe(each, plan) for each in span.split(1)])
    batch, head, token = maybe.nonzero(as_tuple=True)
    if len(token) > FEW * maybe.numel():
        return None
    counts = maybe.sum(-1).flatten()
    slot = torch.arange(len(token)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return Few(batch, head, token, slot)


def margin(head_dim: int, width: int, dtype: torch.dtype) -> float:
    """By how much ‖Uᵀx‖ / ‖x‖ of two computations may differ at most; see above."""
    unit = torch.finfo(dtype).eps / 2
    return 2 * 2 * (head_dim + 2) * (math.sqrt(width) + 2) * unit


@torch.no_grad()
def _maybe(span: Tensor, plan: Plan) -> Tensor:
    """bool [1, H, L] of span [1, H of the model, L, D]: False only where no part's gate can be passed."""
    heads, directions, parts = plan.heads, plan.directions, plan.parts
    head_dim, everyone = span.shape[-1], len(heads) == span.shape[1]
    size = max(1, PIECE // max(1, len(heads) * head_dim))
    widths, found = [part.directions.shape[-1] for part in parts], []
    with exact(span):
        for piece in span.detach().split(size, dim=2):
            vectors = wide(piece if everyone else torch.stack([piece[:, head] for head in heads.tolist()], dim=1))
            # transposed: R rows of tokens take a quarter of the time, and norms run along the tokens
            coordinates = torch.matmul(directions.mT.to(vectors), vectors.mT).split(widths, dim=2)
            found.append([torch.linalg.vector_norm(vectors, dim=-1), *map(_inside, coordinates, parts)])
        whole, *inside = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
    cold = whole < LARGEST
    for part, length in zip(parts, inside, strict=True):
        cut = part.gate.to(whole).sqrt() - margin(head_dim, sum(widths), whole.dtype)
        cold &= length < cut[:, None] * whole - SMALLEST  # False for NaN
    return ~cold


def _inside(coordinates: Tensor, part: Part) -> Tensor:
    """‖Uᵀx‖ [B, H, L] from coordinates [B, H, R + S, L]."""
    if part.unsafe is not None:
        coordinates = torch.matmul(part.unsafe.mT.to(coordinates), coordinates)
    # vector_norm over a dimension that is not the last takes 20 times as long
    return coordinates.square().sum(2).sqrt()
