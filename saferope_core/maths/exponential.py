"""The rotation's matrix exponential exp(s A), for training: with gradients, for all tokens of a head at once.

A is skew, so A = V diag(iθ) Vᴴ with a unitary V, which all tokens of a head share:

    exp(s A) c = V (e^{isθ} ∘ (Vᴴ c)).

Its derivative by A is that of Daleckii and Krein (1965), with divided differences of e^{isθ} that do not divide where
two θ are equal:

    d exp(s A) = V (Φ ∘ (Vᴴ dA V)) Vᴴ,   Φ_jk = s e^{is(θ_j + θ_k) / 2} sinc(s (θ_j − θ_k) / 2),   sinc(z) = sin(z) / z.

On a GPU torch.matrix_exp goes through matrices of large norm one after the other (pytorch/pytorch, issue 107291).

Axes: B batch, H heads, L tokens, R width of a generator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22  # numbers of Φ at once: 16 MB in float32


def eigen(generator: Tensor) -> tuple[Tensor, Tensor]:
    """θ [H, R] float64 and V [H, R, R] complex128 of the skew part of generators A [H, R, R]; not differentiable."""
    wide = generator.detach().double()
    return tuple(torch.linalg.eigh(-0.5j * (wide - wide.mT)))


def exponential_of(coordinates: Tensor, generator: Tensor, scale: Tensor, theta: Tensor, frame: Tensor) -> Tensor:
    """exp(s A) c of coordinates c [B, H, L, R] and scale s [B, H, L], for the skew generator [H, R, R] whose `eigen`
    are θ and V. Differentiable once in c, A and s. Everything in the dtype of c, float32 or float64.
    """
    return _Exponential.apply(coordinates, generator, scale, theta, frame)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coordinates: Tensor, generator: Tensor, scale: Tensor, theta: Tensor, frame: Tensor
    ) -> Tensor:
        """V (e^{isθ} ∘ (Vᴴ c))."""
        theta, frame = theta.to(coordinates), frame.to(coordinates.dtype.to_complex())
        ctx.save_for_backward(coordinates, scale, theta, frame)
        return _out(_phase(scale, theta) * _in(coordinates, frame), frame)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """By c, A and s; the gradient by A is skew, since only the skew part of A is read."""
        coordinates, scale, theta, frame = ctx.saved_tensors
        phase, seen, wanted = _phase(scale, theta), _in(coordinates, frame), _in(gradient, frame)
        turned = phase * seen
        by_coordinates = _out(phase.conj() * wanted, frame)
        by_scale = (wanted.conj() * 1j * theta[:, None] * turned).real.sum(-1)
        inner = _inner(wanted, seen, scale, theta)
        by_generator = (frame.conj() @ inner @ frame.mT).real
        return by_coordinates, (by_generator - by_generator.mT) / 2, by_scale, None, None


def _phase(scale: Tensor, theta: Tensor) -> Tensor:
    """e^{isθ} [B, H, L, R]."""
    return torch.polar(torch.ones((), dtype=theta.dtype, device=theta.device), scale[..., None] * theta[:, None])


def _in(x: Tensor, frame: Tensor) -> Tensor:
    """Vᴴ x."""
    return torch.einsum("bhlr,hrk->bhlk", x.to(frame.dtype), frame.conj())


def _out(x: Tensor, frame: Tensor) -> Tensor:
    """V x, which is real."""
    return torch.einsum("bhlk,hrk->bhlr", x, frame).real


def _inner(wanted: Tensor, seen: Tensor, scale: Tensor, theta: Tensor) -> Tensor:
    """Σ over tokens of conj(ĝ_j) Φ_jk ĉ_k, [H, R, R], in parts of the tokens."""
    half = _phase(0.5 * scale, theta)
    left, right = wanted.conj() * half, half * seen
    apart = (theta[:, :, None] - theta[:, None, :]) / (2 * math.pi)  # torch.sinc(z) is sin(πz) / (πz)
    count = max(1, CHUNK // (scale.shape[0] * apart.numel()))
    total = torch.zeros_like(apart, dtype=left.dtype)
    for first in range(0, scale.shape[2], count):
        part = slice(first, first + count)
        s = scale[:, :, part, None, None]
        between = (s * torch.sinc(s * apart[:, None])).to(left.dtype)
        total += torch.einsum("bhlj,bhljk,bhlk->hjk", left[:, :, part], between, right[:, :, part])
    return total
