"""The turn on a GPU without Triton: ten PyTorch kernels, of which three touch the vectors, and no wider copy.

No synchronisation, and no shape that depends on the data. The coordinates of all concepts come from one product. A
plane's a and b are one complex number z, so a turn by φ adds z (e^iφ − 1). Concepts turn one after the other: the turn
of an earlier concept changes the coordinates of later ones, through the products of their directions.

Axes: H heads of the plan, L tokens, D head dimension, C concepts, P planes, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..maths.rotation import exact, wide
from .packed import QUARTERS, Packed


@torch.no_grad()
def turn_plain(span: Tensor, plan: Packed) -> list[Tensor]:
    """Turns the plan's heads of span [B, H of the model, L, D] in place. Returns above [H, L, C] of every picture: a
    vector turns where it is above 0.

    Products accumulate in float32. Their result is rounded to the span's dtype once, with the sum. Vectors that do not
    turn come back equal, but a −0.0 in them may become 0.0, which attention cannot tell apart.
    """
    return [_turn_picture(picture, plan) for picture in span]


def _turn_picture(picture: Tensor, plan: Packed) -> Tensor:
    with exact(picture):
        vectors = picture if plan.all_heads else picture.index_select(0, plan.heads)
        coordinates = product(vectors, plan.directions)
        width = plan.planes.shape[-1]
        above, risk = _risk(vectors, coordinates[..., width:], plan)
        # with one concept the gate comes last, in the kernel that narrows: no later concept reads ungated values
        alone = plan.theta.shape[1] == 1
        scale = risk if alone else _where_above(above, risk)
        lost = _lost(coordinates[..., :width], scale, plan)
        lost = _where_above(above, lost, vectors.dtype) if alone else lost.to(vectors.dtype)
        vectors.baddbmm_(lost, plan.planes.mT, alpha=-1)
        if not plan.all_heads:
            picture.index_copy_(0, plan.heads, vectors)
    return above


def _risk(vectors: Tensor, unsafe: Tensor, plan: Packed) -> tuple[Tensor, Tensor]:
    """How far vectors [H, L, D] are above their gates, and QUARTERS times their s, both [H, L, C], from their
    coordinates [H, L, C R] in the unsafe subspaces. For the zero vector they are 0 and NaN."""
    inside = torch.linalg.vector_norm(unsafe.unflatten(-1, (plan.cut.shape[-1], -1)), dim=-1)
    whole = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=inside.dtype)
    above = torch.addcmul(inside, whole, plan.cut[:, None], value=-1)
    risk = torch.addcdiv(plan.zero, inside, whole, value=QUARTERS**0.5).square_()
    return above, risk.clamp_(max=QUARTERS) if plan.above_1 else risk


def _where_above(above: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x where above > 0 or NaN, else exactly 0.0, in `dtype`: one kernel."""
    out = torch.empty_like(x, dtype=dtype)
    return torch.ops.aten.threshold_backward.grad_input(x, above, 0.0, grad_input=out)


def _lost(coordinates: Tensor, scale: Tensor, plan: Packed) -> Tensor:
    """The loss by the turns in the coordinates [H, L, C 2P] of all planes: z − z e^iφ; exactly 0.0 where s is 0."""
    concepts, planes = plan.theta.shape[1:]
    phase = _phase(scale, plan)
    flat = torch.view_as_real(phase).flatten(2)
    between = product(plan.planes.mT, plan.planes) if concepts > 1 else None
    for concept, own in enumerate(coordinates.split(2 * planes, -1)):
        if between is not None and concept:
            before = 2 * planes * concept
            own = own.baddbmm(flat[..., :before], between[:, :before, before : before + 2 * planes], alpha=-1)
        z = torch.view_as_complex(own.unflatten(-1, (planes, 2)))
        turn = phase[:, :, concept]
        torch.addcmul(z, z, turn, value=-1, out=turn)  # the loss takes the place of its phase
    return flat


def _phase(scale: Tensor, plan: Packed) -> Tensor:
    """e^iφ [H, L, C, P], φ = s θ, of QUARTERS times s [H, L, C]: a power of e^iθ/4, in one kernel."""
    if plan.turn.is_complex():
        return torch.pow(plan.turn[:, None], scale[..., None])
    angle = scale[..., None] * plan.turn[:, None]
    return torch.polar(plan.one.expand_as(angle), angle)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of [H, n, m] and [H, m, k] in float32 (float64 for float64). CUDA multiplies half precision as it is;
    other devices, which have no such product, widen both first."""
    native = x.device.type in ("cuda", "meta") and torch.version.hip is None  # meta: to be counted as on CUDA
    if native and x.element_size() == 2:
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(wide(x), wide(y))
