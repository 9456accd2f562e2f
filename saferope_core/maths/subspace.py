"""The unsafe subspace of every head, from Gram matrices that are summed up as vectors stream by.

The eigenvectors of the Gram matrix X Xᵀ are the left singular vectors of X, and sums of Gram matrices are Gram
matrices of all the vectors together: one pass, constant memory, exact across batches and processes.

Axes: n vectors, H heads, D head dimension, R subspace rank.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NEAR, TERMS = 0.02, 9  # ‖UᵀU − I‖ up to which 9 terms of the series leave less than float64's rounding: 0.02¹⁰ = 1e-17


class GramSum:
    """A running sum of x xᵀ per head, in float64.

    .gram [H, D, D] float64 and .count [H] int64 are the sums so far. `a + b` is the sum over both streams.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64, device=device)
        self.count = torch.zeros(heads, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors x [n, H, D] of any floating dtype and device."""
        x = x.detach().to(self.gram)
        self.gram += torch.einsum("nhd,nhe->hde", x, x)
        self.count += len(x)

    def __add__(self, other: GramSum) -> GramSum:
        heads, head_dim, _ = self.gram.shape
        total = GramSum(heads, head_dim, self.gram.device)
        total.gram = self.gram + other.gram.to(self.gram)
        total.count = self.count + other.count.to(self.count)
        return total


class SmallGramSum:
    """A GramSum in a quarter of its memory: one triangle, in float32. Each added product is rounded once, after it was
    summed in float64.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.width = head_dim
        self.held = torch.zeros(heads, head_dim * (head_dim + 1) // 2, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors x [n, H, D] of any floating dtype and device."""
        x = x.detach().to(self.held.device, torch.float64)
        lower, _ = _triangle(self.width, self.held.device)
        self.held += torch.einsum("nhd,nhe->hde", x, x).flatten(1).index_select(1, lower).float()

    @property
    def gram(self) -> Tensor:
        """[H, D, D] float64, symmetric."""
        _, whole = _triangle(self.width, self.held.device)
        return self.held.index_select(1, whole).double().unflatten(1, (self.width, self.width))


@cache
def _triangle(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the lower triangle lies in a matrix [D, D], flat, and where each of the matrix' entries lies in it."""
    row, column = torch.tril_indices(width, width, device=device)
    whole = torch.empty(width, width, dtype=torch.long, device=device)
    whole[row, column] = whole[column, row] = torch.arange(len(row), device=device)
    return row * width + column, whole.flatten()


def unsafe_basis(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U: the leading `rank` left singular vectors of a head's unsafe vectors, from their Gram matrix.

    gram [H, D, D] -> basis [H, D, R], orthonormal columns in descending order, and singular_values [H, R]; float64.
    Where fewer than R independent vectors were seen, the last singular values are about 0 and their columns are an
    arbitrary completion. Raises ValueError for a rank that does not fit and for a Gram matrix that is not finite.
    """
    values, vectors = _leading(gram, rank)
    return vectors, values.clamp(min=0.0).sqrt()


def contrastive_basis(unsafe_gram: Tensor, safe_gram: Tensor, rank: int) -> Tensor:
    """Directions in which unsafe vectors have the larger share of their energy than safe ones.

    The leading `rank` eigenvectors of `contrast`; both [H, D, D] -> [H, D, R] float64, orthonormal columns, descending.
    Raises ValueError as `unsafe_basis`, and for a Gram matrix of trace 0.
    """
    return _leading(contrast(unsafe_gram, safe_gram), rank)[1]


def relative_basis(unsafe_gram: Tensor, safe_gram: Tensor, rank: int, count: Tensor) -> Tensor:
    """Directions in which unsafe vectors have the most energy for the energy that safe ones have there.

    Spans the leading `rank` generalised eigenvectors of G_unsafe v = λ (G_safe + μ I) v (Fukunaga and Koontz, 1970;
    the common spatial patterns of EEG). Safe vectors hardly enter the span. So a low LRS there tells already, also for
    words that the unsafe vectors are not made from. μ = tr G_safe / n, for n = `count` [H] safe vectors, is one more
    safe vector in every direction: a direction that a small sample left empty by chance then counts for little. For few
    vectors this is `unsafe_basis`. Both [H, D, D] -> [H, D, R] float64, orthonormal columns. Raises ValueError as
    `contrastive_basis`.
    """
    unsafe, safe = _share(unsafe_gram, "unsafe"), _share(safe_gram, "safe")
    more = torch.eye(safe.shape[-1], dtype=safe.dtype, device=safe.device) / count.to(safe)[:, None, None]
    values, vectors = torch.linalg.eigh(safe + more)
    white = (vectors * values.rsqrt()[:, None]) @ vectors.mT
    patterns = white @ _leading(white @ unsafe @ white, rank)[1]
    return orthonormal(patterns / torch.linalg.vector_norm(patterns, dim=-2, keepdim=True))


def contrast(unsafe_gram: Tensor, safe_gram: Tensor) -> Tensor:
    """G_unsafe / tr G_unsafe − G_safe / tr G_safe: where unsafe vectors have the larger share of their energy. [H, D,
    D].
    """
    return _share(unsafe_gram, "unsafe") - _share(safe_gram, "safe")


def extended(basis: Tensor, symmetric: Tensor, count: int) -> Tensor:
    """`basis` [H, D, R] and `count` more orthonormal columns outside it: [H, D, R + count] float64.

    They are the leading eigenvectors of P M P, with P = I − U Uᵀ and M [H, D, D] symmetric: a Gram matrix of the
    vectors to be added, or a difference of two. Raises ValueError where there is no room for them and where M is not
    finite.
    """
    basis = basis.double()
    width, rank = basis.shape[-2:]
    if not 0 <= count <= width - rank:
        raise ValueError(f"{count} more columns beside {rank}, expected 0 to {width - rank} in {width} dimensions")
    if count == 0:
        return basis
    inside, symmetric = basis @ basis.mT, symmetric.double()
    outside = torch.eye(width, dtype=torch.float64, device=basis.device) - inside
    # U itself has the eigenvalue 0, which may be among the largest of a difference: put it below all others
    below = symmetric.abs().sum(-1).amax(-1)[..., None, None] * inside
    _, added = _leading(outside @ symmetric @ outside - below, count)
    return torch.cat([basis, orthonormal(outside @ added)], dim=-1)


def orthonormal(basis: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the polar factor) to basis [..., D, R]; same dtype.

    That is U (UᵀU)^(−1/2). Where the columns are nearly orthonormal already, as in a file of float16, the root comes
    from its series, in a fifth of the time of the SVD that all others get.
    """
    wide = basis.double()
    off = wide.mT @ wide - torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
    if off.numel() and off.abs().max() * basis.shape[-1] <= NEAR:  # bounds the norm; False for NaN
        return (wide @ _inverse_root(off)).to(basis.dtype)
    left, _, right = torch.linalg.svd(basis.double(), full_matrices=False)
    return (left @ right).to(basis.dtype)


def _inverse_root(off: Tensor) -> Tensor:
    """(I + E)^(−1/2) of small E [..., R, R]: Σ binomial(−1/2, n) Eⁿ, by Horner's rule."""
    identity = torch.eye(off.shape[-1], dtype=off.dtype, device=off.device)
    root = identity
    for n in range(TERMS, 0, -1):
        root = identity - (2 * n - 1) / (2 * n) * off @ root
    return root


def _share(gram: Tensor, name: str) -> Tensor:
    gram = gram.double()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if not (trace > 0).all():
        raise ValueError(f"contrastive basis: the {name} Gram matrix of a head has trace 0 or NaN, expected > 0")
    return gram / trace[:, None, None]


def _leading(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues [H, R] and their eigenvectors [H, D, R] of [H, D, D], descending."""
    width = symmetric.shape[-1]
    if not 1 <= rank <= width:
        raise ValueError(f"rank is {rank}, expected 1 to {width}, the head dimension")
    if not symmetric.isfinite().all():
        raise ValueError("a Gram matrix holds NaN or infinity: the vectors it was summed from are damaged")
    values, vectors = torch.linalg.eigh(symmetric.double())
    values, vectors = values.flip(-1)[:, :rank], vectors.flip(-1)[..., :rank]
    # The sign of an eigenvector is the solver's choice, but a fixed generator turns column 1 towards column 2: make
    # the entry of largest magnitude positive, so that every machine turns the same way.
    peak = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return values, vectors * peak.sign()
