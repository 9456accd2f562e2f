"""The rotation of SafeRoPE, R(x) = U exp(s A) Uᵀ + (I − U Uᵀ), in its exact plane form.

A is skew, so i A is Hermitian: its eigenvalues come in pairs ±θ, and the real and imaginary part of the vector of +θ
span a plane in which A is θ times a quarter turn. exp(s A) turns that plane by the angle s θ and nothing else:
rotary position embedding whose position is the risk s and whose frequencies are θ, in the head's own planes.

Axes: B batch, H heads, L tokens, D head dimension, R subspace rank, P = R // 2 planes, N safety-critical heads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .exponential import eigen as eigen_of
from .exponential import exponential_of


def skew(w: Tensor) -> Tensor:
    """The skew part (w − wᵀ) / 2 of [..., R, R]. Exact: the result equals minus its transpose bit for bit."""
    return (w - w.mT) / 2


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype the arithmetic runs in: float64 stays float64, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def exact(x: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves the arithmetic on `x`'s device alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def planes(generator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies and planes of skew generators A [N, R, R]: A a = θ b and A b = −θ a.

    Returns θ [N, P] >= 0, descending, in radians at s = 1, and a, b [N, R, P], orthonormal together; all float64 on
    the CPU. Only the skew part of `generator` is read. For odd R the one remaining direction is not turned.
    """
    theta, frame = _frames(generator)
    count = theta.shape[-1]
    return theta, frame[..., :count], frame[..., count : 2 * count]


def fold(generator: Tensor, *bases: Tensor) -> tuple[Tensor, ...]:
    """Fold A [N, R, R] and every U [N, D, R] that it turns into what `turn` needs: θ [N, P], and directions [N, D, R]
    for each.

    The columns of `directions` are U a of every plane, then U b, then for odd R the direction that is not turned:
    an orthonormal basis of the same subspace as U, so one projection gives both the LRS and the plane coordinates.
    Computed in float64 on the CPU, returned in the dtype and on the device of each basis; not differentiable.
    """
    theta, frame = _frames(generator)
    directions = ((basis.detach().to("cpu", torch.float64) @ frame).to(basis) for basis in bases)
    return theta.to(bases[0]), *directions


def turn(x: Tensor, directions: Tensor, theta: Tensor, scale: Tensor, coordinates: Tensor | None = None) -> Tensor:
    """R(x) x for every token and head: plane p of head h is turned by the angle scale * θ[h, p].

    x [B, H, L, D], directions [H, D, >= 2P] and θ [H, P] from `fold`, scale [B, H, L] = s from `saturated`.
    `coordinates` [B, H, L, >= 2P] are x in `directions`, for a caller who has them already.
    Computed in float32 (float64 for float64), returned in x's dtype. A token whose scale is 0 returns bit for bit.
    """
    count, vectors = theta.shape[-1], wide(x)
    with exact(x):
        used = directions[..., : 2 * count].to(vectors)
        if coordinates is None:
            coordinates = torch.einsum("bhld,hdp->bhlp", vectors, used)
        angle = scale.to(vectors)[..., None] * theta.to(vectors)[:, None]
        moved = _swing(coordinates[..., : 2 * count], angle)
        turned = vectors + torch.einsum("bhlp,hdp->bhld", moved, used)
    # x + 0 is not always x (-0.0, inf), hence the choice instead of trusting cos 0 = 1
    return torch.where((scale == 0)[..., None], x, turned.to(x.dtype))


def rotate_by_generator(
    x: Tensor, basis: Tensor, generator: Tensor, scale: Tensor, eigen: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """R(x) x in the form to train with, differentiable in every argument.

    x [B, H, L, D], basis U [H, D, R], generator A [H, R, R] (keep it skew), scale [B, H, L]. `eigen` is the generator's
    own, for a caller who has it already. Tokens with scale 0 return bit for bit. Dtypes as in `turn`, to which it is
    equal.
    """
    vectors = wide(x)
    with exact(x):
        basis, generator, scale = basis.to(vectors), generator.to(vectors), scale.to(vectors)
        theta, frame = eigen_of(generator) if eigen is None else eigen
        coordinates = torch.einsum("bhld,hdr->bhlr", vectors, basis)
        moved = exponential_of(coordinates, generator, scale, theta, frame) - coordinates
        turned = vectors + torch.einsum("bhlr,hdr->bhld", moved, basis)
    return torch.where((scale == 0)[..., None], x, turned.to(x.dtype))


def bounded(generator: Tensor, angle: float) -> Tensor:
    """Skew generators A [N, R, R], with every plane that turns further than `angle` > 0 at s = 1 held at `angle`.

    A S⁻¹ min(S, angle), S = (AᵀA)^(1/2), whose eigenvalues are the θ of the planes. Planes within the bound keep their
    angle, up to rounding. Computed in float32 (float64 for float64); exactly skew, in A's dtype; not for gradients.
    """
    vectors = wide(generator)
    squares, frame = torch.linalg.eigh(vectors.mT @ vectors)
    factor = angle / squares.clamp(min=angle**2).sqrt()  # 1 within the bound
    return skew((vectors @ (frame * factor[..., None, :]) @ frame.mT).to(generator.dtype))


def _swing(coordinates: Tensor, angle: Tensor) -> Tensor:
    """What turning by `angle` [..., P] adds to the plane coordinates [..., 2P], all a first, then all b."""
    a, b = coordinates.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos * a - sin * b - a, sin * a + cos * b - b), dim=-1)


def _frames(generator: Tensor) -> tuple[Tensor, Tensor]:
    """θ [N, P] and orthonormal frames [N, R, R] whose columns are the a of every plane, the b, and the direction that
    is left.
    """
    generator = skew(generator.detach().to("cpu", torch.float64))
    count = generator.shape[-1] // 2
    values, vectors = torch.linalg.eigh(1j * generator)
    theta = values.flip(-1)[..., :count].clamp(min=0.0)
    half = vectors.flip(-1)[..., :count]
    pairs = torch.stack((half.real, half.imag), dim=-1).flatten(-2)  # a1 b1 a2 b2 ...
    # Where θ is 0 the real and imaginary part need not be independent. Gram-Schmidt in descending order of θ keeps
    # every plane that turns and fills the rest with any directions of the kernel.
    frame, triangle = torch.linalg.qr(pairs, mode="complete")
    flipped = triangle.diagonal(dim1=-2, dim2=-1) < 0  # a reflected a or b would turn the wrong way
    frame[..., : 2 * count] *= torch.where(flipped, -1.0, 1.0)[..., None, :]
    order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2), *range(2 * count, generator.shape[-1])]
    return theta, frame[..., order]
