"""The rotation's matrix exponential exp(s A), for training: with gradients, for all tokens of a head at once.

A is skew, so A = V diag(iθ) Vᴴ with a unitary V, which all tokens of a head share:

    exp(s A) c = V t,   t = e^{isθ} ∘ ĉ,   ĉ = Vᴴ c.

Let g be the result's gradient, ĝ = Vᴴ g and ĥ = e^{−isθ} ∘ ĝ. The gradient by A is that of Daleckii and Krein (1965),
the skew part of

    Re(V̄ M Vᵀ),   M_jk = Σ over tokens of conj(ĝ_j) Φ_jk ĉ_k,   Φ_jk = (e^{isθ_j} − e^{isθ_k}) / (i(θ_j − θ_k)),

so M_jk = (ĥᴴ ĉ − ĝᴴ t)_jk / (i(θ_j − θ_k)), two products of matrices. Where θ_j and θ_k are near each other, Φ is
s times the mean of both exponentials, by the trapezoidal rule, and nothing is divided. In float64 either is right to
NEAR² there.

Complex numbers are pairs of real ones: Vᴴ c is one product with [Re V, −Im V], [H, R, 2R].

On a GPU torch.matrix_exp goes through matrices of large norm one after the other (pytorch/pytorch, issue 107291).

Axes: B batch, H heads, L tokens, T = B L, R width of a generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The trapezoidal rule is off by (s NEAR)² / 12 of s, the difference by ε / NEAR: alike at the cube root of float64's ε
NEAR = torch.finfo(torch.float64).eps ** (1 / 3)


def eigen(generator: Tensor) -> tuple[Tensor, Tensor]:
    """θ [H, R] float64 and V [H, R, R] complex128 of the skew part of generators A [H, R, R]; not differentiable."""
    wide = generator.detach().double()
    return tuple(torch.linalg.eigh(-0.5j * (wide - wide.mT)))


def exponential_of(coordinates: Tensor, generator: Tensor, scale: Tensor, theta: Tensor, frame: Tensor) -> Tensor:
    """exp(s A) c of coordinates c [B, H, L, R] and scale s [B, H, L] in [0, 1], for the skew generator [H, R, R] whose
    `eigen` are θ and V. Differentiable once in c, A and s. Computed in the dtype of c, float32 or float64; gradients in
    float64, returned in that of c.
    """
    return _Exponential.apply(coordinates, generator, scale, theta, frame)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coordinates: Tensor, generator: Tensor, scale: Tensor, theta: Tensor, frame: Tensor
    ) -> Tensor:
        """V (e^{isθ} ∘ (Vᴴ c))."""
        theta, pairs = theta.to(coordinates), torch.cat((frame.real, -frame.imag), -1).to(coordinates)
        ctx.save_for_backward(coordinates, scale, theta, pairs)
        turned = _times(_phase(scale, theta), coordinates @ pairs)
        return turned @ pairs.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """By c, A and s; the gradient by A is skew, since only the skew part of A is read."""
        coordinates, scale, theta, pairs = ctx.saved_tensors
        places = _places(gradient)
        c, g, s = (_picked(_by_head(x), places).double() for x in (coordinates, gradient, scale[..., None]))
        theta, pairs = theta.double(), pairs.double()
        cos, sin = _phase(s[..., 0], theta)
        seen, wanted = c @ pairs, g @ pairs
        turned, back = _times((cos, sin), seen), _times((cos, -sin), wanted)
        by_scale = (_quarter(turned) * wanted * theta.repeat(1, 2)[:, None]).sum(-1, keepdim=True)
        inner = _inner(wanted, back, seen, turned, s, theta)
        frame = torch.complex(*_halves(pairs)).conj()
        by_generator = (frame.conj() @ inner @ frame.mT).real
        return (
            _put(back @ pairs.mT, places, coordinates),
            ((by_generator - by_generator.mT) / 2).to(coordinates),
            _put(by_scale, places, scale[..., None])[..., 0],
            None,
            None,
        )


def _inner(wanted: Tensor, back: Tensor, seen: Tensor, turned: Tensor, scale: Tensor, theta: Tensor) -> Tensor:
    """M [H, R, R], complex, from ĝ, ĥ, ĉ and t, pairs [H, T, 2R], and s [H, T, 1]."""
    apart = theta[:, :, None] - theta[:, None, :]
    near = apart.abs() < NEAR
    far = _product(torch.cat((back, -wanted), 1), torch.cat((seen, turned), 1))
    alike = _product(torch.cat((back, wanted), 1), torch.cat((scale * seen, scale * turned), 1)) / 2
    return torch.where(near, alike, far / (1j * apart.masked_fill(near, 1.0)))


def _phase(scale: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of e^{isθ} [..., H, T, R], for s [..., H, T]."""
    angle = scale[..., None] * theta[:, None]
    return angle.cos(), angle.sin()


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, -1)


def _times(phase: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Pairs x times e^{isθ}."""
    (cos, sin), (real, imaginary) = phase, _halves(x)
    return torch.cat((cos * real - sin * imaginary, sin * real + cos * imaginary), -1)


def _quarter(x: Tensor) -> Tensor:
    """Pairs x times i."""
    real, imaginary = _halves(x)
    return torch.cat((-imaginary, real), -1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """xᴴ y [H, R, R], complex, of pairs [H, T, 2R]."""
    (real, first), (second, imaginary) = (part.chunk(2, -1) for part in (x.mT @ y).chunk(2, -2))
    return torch.complex(real + imaginary, first - second)


def _by_head(x: Tensor) -> Tensor:
    """[B, H, L, R] as [H, B L, R]."""
    return x.transpose(0, 1).flatten(1, 2)


def _places(gradient: Tensor) -> Tensor | None:
    """On a CPU [H, n]: each head's tokens with a gradient, filled up to the n of the fullest head with tokens without,
    which add nothing: tokens that stay have none. None where all are taken, as on a GPU, whose shapes do not depend on
    data.
    """
    if gradient.device.type != "cpu":
        return None
    has = (_by_head(gradient) != 0).any(-1)
    return has.byte().argsort(dim=-1, descending=True, stable=True)[:, : int(has.sum(-1).max())]


def _picked(x: Tensor, places: Tensor | None) -> Tensor:
    """Those tokens of x [H, T, R]."""
    return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _put(x: Tensor, places: Tensor | None, like: Tensor) -> Tensor:
    """Tokens x [H, n, R] back in the places and the dtype of `like` [B, H, L, R], 0 elsewhere."""
    whole = torch.zeros_like(_by_head(like))
    found = (
        x.to(like) if places is None else whole.scatter(1, places[..., None].expand(-1, -1, x.shape[-1]), x.to(like))
    )
    return found.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)
