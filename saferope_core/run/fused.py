"""The turn on a GPU with Triton: one kernel that reads a block's vectors once and writes the vectors that turn.

A program takes a tile of tokens of one head of one picture and goes through all concepts. LRS, angles and sums are
float32 in registers, products take the vectors as they are, and a tile in which nothing turns is read and left. There
is no synchronisation and no shape that depends on the data. `saferope::turn` is an operator of PyTorch, so that
torch.compile passes it on as it is.

Axes: B batch, H heads of the plan, L tokens, D head dimension, C concepts, P planes, R rank.
"""

# Triton takes the types of a kernel's arguments from the call
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import Packed

LEAST = 16  # of every side of a product on tensor cores
# in a tile, by head dimension: what registers hold. Triton 3.7.0 fails to compile 64 rows for sm_100
TOKENS = {256: 32, 512: 16}
STAGES = 1  # of loads in flight: a second concept's would spill
# Triton's interpreter multiplies the bits of bfloat16 as whole numbers. Products of half precision fit into float32.
WIDEN = triton.knobs.runtime.interpret
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _dot(x, y, WIDEN: tl.constexpr):
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def turn_tile(
    x,
    heads,
    directions,
    theta,
    cut,
    counts,
    passed,
    tokens,
    batch_stride,
    head_stride,
    token_stride,
    CONCEPTS: tl.constexpr,
    PLANES: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES_2: tl.constexpr,  # at least LEAST, a power of 2; so are the next two
    RANK_2: tl.constexpr,
    WIDTH_2: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTED: tl.constexpr,  # whether to add to counts [C, B, L]
    TOLD: tl.constexpr,  # whether to write passed [B, H, L, C]
    WIDEN: tl.constexpr,
):
    tile, slot, picture = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, d = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH_2)
    p, r = tl.arange(0, PLANES_2), tl.arange(0, RANK_2)
    x += picture.to(tl.int64) * batch_stride + tl.load(heads + slot) * head_stride
    at = x + row[:, None] * token_stride + d[None, :]
    here = (row < tokens)[:, None] & (d < WIDTH)[None, :]
    vectors = tl.load(at, mask=here, other=0.0)
    whole = tl.sqrt(tl.sum(vectors.to(tl.float32) * vectors.to(tl.float32), 1))
    added = tl.zeros((TOKENS, WIDTH_2), tl.float32)
    turned = tl.zeros((TOKENS,), tl.int32)
    columns: tl.constexpr = CONCEPTS * (2 * PLANES + RANK)
    directions += slot.to(tl.int64) * WIDTH * columns + d[:, None] * columns
    in_planes = (d < WIDTH)[:, None] & (p < PLANES)[None, :]
    in_rank = (d < WIDTH)[:, None] & (r < RANK)[None, :]
    for concept in range(CONCEPTS):
        unsafe = tl.load(directions + CONCEPTS * 2 * PLANES + concept * RANK + r[None, :], mask=in_rank, other=0.0)
        inside = _dot(vectors, unsafe, WIDEN)
        inside = tl.sqrt(tl.sum(inside * inside, 1))
        risk = (inside / whole) * (inside / whole)
        s = tl.where(risk > 1.0, 1.0, risk)
        # 0 for the zero vector, whose risk is 0 / 0; NaN for a vector with NaN
        s = tl.where(inside <= tl.load(cut + slot * CONCEPTS + concept) * whole, 0.0, s)
        hit = (s != 0.0).to(tl.int32)
        if COUNTED:
            place = (concept * tl.num_programs(2) + picture) * tokens + row
            tl.atomic_add(counts + place, 1.0, mask=hit > 0, sem="relaxed")
        if TOLD:
            place = (picture * tl.num_programs(1) + slot) * tokens + row
            tl.store(passed + place.to(tl.int64) * CONCEPTS + concept, hit.to(tl.uint8), mask=row < tokens)
        if tl.max(hit, 0) > 0:
            turned = turned | hit
            a_at = directions + concept * 2 * PLANES + 2 * p[None, :]
            a_plane, b_plane = tl.load(a_at, mask=in_planes, other=0.0), tl.load(a_at + 1, mask=in_planes, other=0.0)
            a = _dot(vectors, a_plane, WIDEN)
            b = _dot(vectors, b_plane, WIDEN)
            if CONCEPTS > 1:  # the turns of earlier concepts
                before = added.to(vectors.dtype)
                a += _dot(before, a_plane, WIDEN)
                b += _dot(before, b_plane, WIDEN)
            angle = (
                s[:, None]
                * tl.load(theta + (slot * CONCEPTS + concept) * PLANES + p, mask=p < PLANES, other=0.0)[None, :]
            )
            half = tl.sin(angle * 0.5)
            cos_1, sin = -2.0 * half * half, tl.sin(angle)
            to_a, to_b = (cos_1 * a - sin * b).to(vectors.dtype), (sin * a + cos_1 * b).to(vectors.dtype)
            added += _dot(to_a, tl.trans(a_plane), WIDEN)
            added += _dot(to_b, tl.trans(b_plane), WIDEN)
    result = (vectors.to(tl.float32) + added).to(vectors.dtype)
    tl.store(at, result, mask=here & (turned > 0)[:, None])


@torch.library.custom_op("saferope::turn", mutates_args=("span", "counts", "passed"))
def turn_op(
    span: Tensor,
    heads: Tensor,
    directions: Tensor,
    theta: Tensor,
    cut: Tensor,
    counts: Tensor | None,
    passed: Tensor | None,
) -> None:
    """See `turn_fused`; the tensors of a `Packed`."""
    pictures, _, tokens, _ = span.shape
    if not span.numel():
        return
    sizes = constants(*theta.shape[1:], directions, counts is not None, passed is not None)
    grid = (triton.cdiv(tokens, sizes["TOKENS"]), len(heads), pictures)
    kept = [theta if each is None else each for each in (counts, passed)]
    launch = {"num_warps": warps(theta.shape[1]), "num_stages": STAGES}
    turn_tile[grid](span, heads, directions, theta, cut, *kept, tokens, *span.stride()[:3], **sizes, **launch)


@turn_op.register_fake
def _(span, heads, directions, theta, cut, counts, passed) -> None:
    return None


def warps(concepts: int) -> int:
    """The warps of a program: with several concepts twice as many, which hold the turns of earlier concepts."""
    return 4 if concepts == 1 else 8


def constants(
    concepts: int, planes: int, directions: Tensor, counted: bool = False, told: bool = False
) -> dict[str, int | bool]:
    """The kernel's compile-time sizes for directions [H, D, C (2P + R)]."""
    width, rank = directions.shape[1], directions.shape[2] // concepts - 2 * planes
    padded = [max(LEAST, triton.next_power_of_2(size)) for size in (planes, rank, width)]
    names = (
        "CONCEPTS",
        "PLANES",
        "RANK",
        "WIDTH",
        "PLANES_2",
        "RANK_2",
        "WIDTH_2",
        "TOKENS",
        "COUNTED",
        "TOLD",
        "WIDEN",
    )
    tile = next(tokens for most, tokens in TOKENS.items() if width <= most)
    return dict(zip(names, (concepts, planes, rank, width, *padded, tile, counted, told, WIDEN), strict=True))


@torch.no_grad()
def turn_fused(span: Tensor, plan: Packed, counts: Tensor | None = None, passed: Tensor | None = None) -> None:
    """Turns the plan's heads of span [B, H of the model, L, D], last stride 1, in place.

    Vectors that do not turn are not written. Their dtype is one of DTYPES. Turned vectors are rounded to it once.
    counts, float32 [C, B, L], grow by the number of heads that turn a token. passed, uint8 [B, H, L, C], is set to 1
    where a head turns a token, else to 0. Both contiguous.
    """
    turn_op(span, plan.heads, plan.directions, plan.theta, plan.cut, counts, passed)
