"""A stream of tokens, text or image, and how a concept turns its queries and keys.

Axes: N safety-critical heads, D head dimension, R subspace rank, S reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

STREAMS = ("text", "image")
ROLES = ("q", "k")

T = TypeVar("T")


@dataclass(frozen=True)
class Roles(Generic[T]):
    """One value for queries and one for keys; `pair["q"]` is the first."""

    q: T
    k: T

    def __getitem__(self, role: str) -> T:
        return {"q": self.q, "k": self.k}[role]


@dataclass(frozen=True, eq=False)
class Stream:
    """How the tokens of one stream turn in every safety-critical head.

    Image tokens may have bases of their own, of another width. Where `basis` is None they turn in the text stream's
    bases, with the text stream's gates and full LRS, as in the paper. Where `acts_on` is None, the roles of the text
    stream turn.
    """

    generator: Tensor  # [N, R + S, R + S], skew: the same for queries and keys; zero where a head does not turn
    basis: Roles[Tensor] | None = None  # [N, D, R + S], orthonormal columns: the unsafe subspace, then the reach
    gate: Roles[Tensor | None] = Roles(None, None)  # [N] in [0, 1]: the LRS above which a vector turns
    acts_on: str | None = None  # the roles that turn: "qk", "q" or "k"
    full: Roles[Tensor | None] = Roles(None, None)  # [N] in (0, 1]: the LRS at which it turns by its full angle, else 1

    def at(self, heads: Tensor) -> Stream:
        """The stream in some of its heads, bool [N]."""
        own = tensors_of(self, NAMES["text"])
        kept = {name: None if tensor is None else tensor[heads] for name, tensor in own.items()}
        return stream_of(kept, self.acts_on, NAMES["text"])

    def still(self) -> Stream:
        """The stream with generators of zero."""
        return replace(self, generator=torch.zeros_like(self.generator))


@dataclass(frozen=True)
class Names:
    """The names of a stream's tensors, and of its roles, in a concept file."""

    generator: str
    basis: Roles[str]
    gate: Roles[str]
    full: Roles[str]
    acts_on: str


NAMES = {
    "text": Names(
        "generator_text", Roles("basis_q", "basis_k"), Roles("gate_q", "gate_k"), Roles("full_q", "full_k"), "acts_on"
    ),
    "image": Names(
        "generator_image",
        Roles("basis_image_q", "basis_image_k"),
        Roles("gate_image_q", "gate_image_k"),
        Roles("full_image_q", "full_image_k"),
        "acts_on_image",
    ),
}


def tensors_of(stream: Stream, names: Names) -> dict[str, Tensor | None]:
    """The tensors of a stream by their names in a file; None where it has none."""
    basis: Roles[Tensor | None] = Roles(None, None) if stream.basis is None else Roles(stream.basis.q, stream.basis.k)
    found: dict[str, Tensor | None] = {names.generator: stream.generator}
    found |= {names.basis[role]: basis[role] for role in ROLES}
    found |= {names.gate[role]: stream.gate[role] for role in ROLES}
    return found | {names.full[role]: stream.full[role] for role in ROLES}


def stream_of(tensors: Mapping[str, Tensor | None], acts_on: str | None, names: Names) -> Stream:
    """The stream of these tensors; the reverse of `tensors_of`."""
    q, k = (tensors.get(names.basis[role]) for role in ROLES)
    basis = None if q is None and k is None else Roles(q, k)
    gate, full = (Roles(*(tensors.get(own[role]) for role in ROLES)) for own in (names.gate, names.full))
    return Stream(tensors[names.generator], basis, gate, acts_on, full)  # type: ignore[arg-type]  # a Concept refuses None
