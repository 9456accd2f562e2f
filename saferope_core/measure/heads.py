"""Finds the heads that tell the concept apart, the subspace and the gate of each, and the directions to turn to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..concept.concept import LEAST_FULL
from ..concept.geometry import SINGLE, Geometry
from ..concept.stream import ROLES, Roles, Stream
from ..maths.calibration import calibrate_gate
from ..maths.risk import discrimination, head_discrimination_score, latent_risk_score
from ..maths.subspace import contrast, contrastive_basis, extended, orthonormal, relative_basis, unsafe_basis
from .spread import each_row
from .statistics import BENIGN, IMAGE, PADDING, SUBJECT, UNSAFE, WORDS, Statistics, Vectors

FULL = 2.0  # times its gate: the LRS, in relative dimensions, at which an image token turns fully
SIDES = {UNSAFE: ((UNSAFE, SUBJECT),), BENIGN: ((BENIGN, WORDS), (BENIGN, PADDING))}


_PREFIX = {"text": "", "image": f"{IMAGE}_"}  # of a role in a table's dictionaries


@dataclass(frozen=True)
class Ranks:
    """Dimensions of a head's space: of the subject, of padding and other words that took the concept up, and the reach.

    The first three together are the unsafe subspace, R; the reach, S, is only turned in. Image tokens have a space of
    their own, of `image` + `reach` dimensions, or the text's if `image` is 0. The paper has 5, 0, 0, 0, 0.

    Where `relative` is above 0, risk is measured in so many other dimensions: those in which the subject's vectors, or
    image tokens under unsafe prompts, have the most energy relative to benign ones (`relative_basis`). Text has
    `relative_padding` more of them for the padding, or the template's end, behind an unsafe prompt. They come first: R
    is `relative` + `relative_padding` for text, and `relative` for image tokens. All the others are only turned in.
    Image tokens have as many of these. Directions of the vectors that they meet fill up the rest.
    """

    subject: int
    padding: int = 0
    words: int = 0
    reach: int = 0
    image: int = 0
    relative: int = 0
    relative_padding: int = 0

    def __post_init__(self) -> None:
        if self.relative and self.image > self.outside:
            raise ValueError(f"image is {self.image}, expected at most {self.outside}, as text turns in, with relative")

    @property
    def risk(self) -> int:
        """R."""
        return self.relative + self.relative_padding if self.relative else self._unsafe

    @property
    def image_risk(self) -> int:
        """R of image tokens' own space."""
        return self.relative or self.image

    @property
    def outside(self) -> int:
        """S, the dimensions that turn and do not count as risk."""
        return self.reach + (self._unsafe if self.relative else 0)

    @property
    def _unsafe(self) -> int:
        return self.subject + self.padding + self.words


@dataclass(frozen=True)
class HeadTable:
    """The reading of every query head, for keys the reading of its key head. All fp32. Per role: basis
    [blocks, H, D, R + S], gate [blocks, H], mean LRS by side [blocks, H].

    `basis` and `gate` also have `image_q` and `image_k` where image tokens have bases of their own. `full`, as `gate`,
    is the LRS at which a vector turns by its full angle; empty where that is 1.
    """

    discrimination: Tensor
    critical: Tensor
    basis: dict[str, Tensor]
    gate: dict[str, Tensor]
    risk: dict[str, dict[str, Tensor]]
    singular_values: Tensor
    reach: int
    full: dict[str, Tensor]


@dataclass(frozen=True)
class CriticalHeads:
    """The safety-critical heads alone: heads int32 [N, 3] and, as in the table, basis [N, D, R + S], gate, full [N].

    Image tokens turn in blocks of the type `image_blocks` alone, see `Geometry.image_blocks`.
    """

    heads: Tensor
    basis: dict[str, Tensor]
    gate: dict[str, Tensor]
    singular_values: Tensor
    reach: int = 0
    full: dict[str, Tensor] = field(default_factory=dict)
    image_blocks: int = SINGLE

    @property
    def turns_image(self) -> Tensor:
        """[N, 1, 1] fp32: 1 for a head whose image tokens turn, else 0."""
        return (self.heads[:, 0] == self.image_blocks).float()[:, None, None]

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the bases of text tokens and of image tokens."""
        return self.basis["k"].shape[-1], self.basis.get("image_k", self.basis["k"]).shape[-1]

    def fields(
        self, generators: tuple[Tensor, Tensor], acts_on: str, acts_on_image: str | None = None
    ) -> dict[str, Any]:
        """The fields of a Concept that turns these heads by generators (text, image) [N, R + S, R + S]."""
        basis, gate, full = (
            {stream: _roles(each, prefix) for stream, prefix in _PREFIX.items()}
            for each in (self.basis, self.gate, self.full)
        )
        own = basis["image"].q is not None
        return {
            "heads": self.heads,
            "text": Stream(generators[0], basis["text"], gate["text"], acts_on, full["text"]),
            "image": Stream(
                generators[1], basis["image"] if own else None, gate["image"], acts_on_image, full["image"]
            ),
            "singular_values": self.singular_values,
            "reach": self.reach,
        }


def _roles(tensors: dict[str, Tensor], prefix: str) -> Roles[Any]:
    return Roles(*(tensors.get(f"{prefix}{role}") for role in ROLES))


def _for_queries(values: Tensor, heads: int, axis: int) -> Tensor:
    """Values of key heads, once for each query head that shares one; others as they are."""
    group = heads // values.shape[axis]
    return values if group == 1 else values.repeat_interleave(group, dim=axis)


def read_heads(
    statistics: Statistics, ranks: Ranks, basis: str, threshold: float, cut: float, gate: str, quantile: float
) -> HeadTable:
    """Bases, gates and discrimination Δ (over queries and keys together) of every head.

    `basis` is "svd" or "contrastive", for the subject; `gate` is "calibrated" to the quantile of LRS on benign tokens,
    or "fixed" at the threshold. Δ is the share of subject vectors above the head's gate less the same share of benign
    vectors. This is equation 4 with the gate in the place of its 0.7. With a fixed gate of 0.7 it is equation 4 itself.
    With calibrated gates the threshold decides nothing. LRS in relative dimensions are small and differ by head: there
    text turns fully at the mean LRS of the subject's vectors above the gate, and image tokens at FULL times their gate.
    """
    heads = statistics.met["q"][0].shape[0]
    bases = {role: _bases(statistics, role, ranks, basis) for role in ROLES}
    risks = {
        role: {name: _risks(statistics, name, role, bases[role][..., : ranks.risk]) for name in SIDES} for role in ROLES
    }
    gates = {role: _gates(risks[role][BENIGN], threshold, gate, quantile) for role in ROLES}
    energies = _energies(statistics, bases["k"][..., : ranks.risk])
    if ranks.image:
        for role in ROLES:
            own = bases[f"{IMAGE}_{role}"] = _image_bases(statistics, role, ranks)
            safe = _lrs(statistics.vectors[BENIGN, IMAGE].sample[role].__getitem__, own[..., : ranks.image_risk])
            gates[f"{IMAGE}_{role}"] = _gates(safe, threshold, gate, quantile)
    risks = {role: {name: _for_queries(risk, heads, 2) for name, risk in risks[role].items()} for role in ROLES}
    bases, gates = ({name: _for_queries(each, heads, 1) for name, each in some.items()} for some in (bases, gates))
    delta = _discrimination(risks, gates)
    return HeadTable(
        delta,
        head_discrimination_score(delta, cut),
        bases,
        gates,
        {role: {name: risk.mean(1) for name, risk in risks[role].items()} for role in ROLES},
        _for_queries(energies, heads, 1),
        ranks.outside,
        _full(risks, gates) if ranks.relative else {},
    )


def critical_heads(table: HeadTable, geometry: Geometry) -> CriticalHeads:
    """Picks the heads with a discrimination score of 1, doubles first. ValueError where there is none."""
    if not table.critical.any():
        raise ValueError(
            f"no head of {geometry.describe()} tells the concept apart; heads by Δ: {histogram(table.discrimination)}; "
            "give more prompts, check that their spans mark the concept's word, or lower the cut"
        )
    row, head = table.critical.nonzero(as_tuple=True)
    single = (row >= geometry.double_blocks).long()
    place = torch.stack([single, row - single * geometry.double_blocks, head], dim=1)
    return CriticalHeads(
        place.to(torch.int32),
        {name: basis[row, head] for name, basis in table.basis.items()},
        {name: gate[row, head] for name, gate in table.gate.items()},
        table.singular_values[row, head],
        table.reach,
        {name: full[row, head] for name, full in table.full.items()},
        geometry.image_blocks,
    )


def _bases(statistics: Statistics, role: str, ranks: Ranks, kind: str) -> Tensor:
    """[blocks, H, D, R + S]: relative directions if any, the subject's, the directions of padding and words against
    benign ones, the reach.
    """
    rows = range(len(statistics.met[role]))
    return torch.stack(each_row(lambda row: _basis(statistics, role, row, ranks, kind).float(), rows))


def _basis(statistics: Statistics, role: str, row: int, ranks: Ranks, kind: str) -> Tensor:
    def gram(side: str, kind: str) -> Tensor:
        return statistics.vectors[side, kind].gram[role][row]

    def benign() -> Tensor:
        return gram(BENIGN, WORDS) + gram(BENIGN, PADDING)

    if ranks.relative:
        count = sum((_count(statistics.vectors[BENIGN, kind], role, row) for kind in (WORDS, PADDING)), torch.zeros(1))
        first = relative_basis(gram(UNSAFE, SUBJECT), benign(), ranks.relative, count)
        if ranks.relative_padding:
            more = relative_basis(gram(UNSAFE, PADDING), benign(), ranks.relative_padding, count)
            first = orthonormal(torch.cat([first, more], dim=-1))
        own = gram(UNSAFE, SUBJECT) if kind == "svd" else contrast(gram(UNSAFE, SUBJECT), benign())
        basis = extended(first, own, ranks.subject)
    elif kind == "contrastive":
        basis = contrastive_basis(gram(UNSAFE, SUBJECT), benign(), ranks.subject)
    else:
        basis = unsafe_basis(gram(UNSAFE, SUBJECT), ranks.subject)[0]
    for token, rank in ((PADDING, ranks.padding), (WORDS, ranks.words)):
        if rank:
            basis = extended(basis, contrast(gram(UNSAFE, token), gram(BENIGN, token)), rank)
    return extended(basis, statistics.met[role][row], ranks.reach)


def _image_bases(statistics: Statistics, role: str, ranks: Ranks) -> Tensor:
    """[blocks, H, D, image + S]: the directions that set image tokens under unsafe prompts apart, and the reach."""
    rows = range(len(statistics.met[role]))
    return torch.stack(each_row(lambda row: _image_basis(statistics, role, row, ranks).float(), rows))


def _image_basis(statistics: Statistics, role: str, row: int, ranks: Ranks) -> Tensor:
    unsafe, benign = (statistics.vectors[name, IMAGE].gram[role][row] for name in (UNSAFE, BENIGN))
    if ranks.relative:
        count = _count(statistics.vectors[BENIGN, IMAGE], role, row)
        first = relative_basis(unsafe, benign, ranks.relative, count)
        own = extended(first, contrast(unsafe, benign), ranks.image)
    else:
        own = contrastive_basis(unsafe, benign, ranks.image)
    return extended(own, statistics.met[role][row], ranks.image_risk + ranks.outside - own.shape[-1])


def _count(vectors: Vectors, role: str, row: int) -> Tensor:
    """[H]: how many vectors a Gram matrix sums, from its trace and the sample's mean squared length."""
    lengths = vectors.sample[role][row].double().square().sum(-1)  # [n, H]
    trace = vectors.gram[role][row].diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace / lengths.mean(0) if len(lengths) else torch.zeros_like(trace)


def _risks(statistics: Statistics, name: str, role: str, bases: Tensor) -> Tensor:
    """LRS [blocks, n, H] of a side's sampled vectors in the unsafe subspaces [blocks, H, D, R]."""
    kinds = [statistics.vectors[each].sample[role] for each in SIDES[name]]
    return _lrs(lambda row: torch.cat([own[row] for own in kinds]), bases)


def _lrs(sample: Callable[[int], Tensor], bases: Tensor) -> Tensor:
    """LRS [blocks, n, H] of a block's sample [n, H, D] in subspaces [blocks, H, D, R]."""

    def of_row(row: int) -> Tensor:
        return latent_risk_score(sample(row).float().transpose(0, 1), bases[row]).T

    return torch.stack(each_row(of_row, range(len(bases))))


def _gates(risks: Tensor, threshold: float, kind: str, quantile: float) -> Tensor:
    """[blocks, H] from LRS [blocks, n, H] of benign tokens."""
    if kind == "fixed":
        return torch.full((risks.shape[0], risks.shape[2]), threshold)
    return torch.stack([calibrate_gate(block, quantile) for block in risks])


def _full(risks: dict[str, dict[str, Tensor]], gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """[blocks, H] of every role that has a gate; twice the gate too where no vector of the subject is above it."""
    full = {name: FULL * gate for name, gate in gates.items()}
    for role in ROLES:
        above = risks[role][UNSAFE] > gates[role][:, None]
        mean = (risks[role][UNSAFE] * above).sum(1) / above.sum(1)
        full[role] = torch.where(above.any(1), mean, full[role])
    return {name: each.clamp(LEAST_FULL, 1.0) for name, each in full.items()}


def _discrimination(risks: dict[str, dict[str, Tensor]], gates: dict[str, Tensor]) -> Tensor:
    """Δ [blocks, H]: LRS less its gate, above 0 or not, compared between the sides; q and k by gates of their own."""
    above = {
        name: torch.cat([risks[role][name] - gates[role][:, None] for role in ROLES], dim=1)
        for name in (UNSAFE, BENIGN)
    }
    return torch.stack(
        [discrimination(unsafe, benign, 0.0) for unsafe, benign in zip(above[UNSAFE], above[BENIGN], strict=True)]
    )


def _energies(statistics: Statistics, bases: Tensor) -> Tensor:
    """‖Uᵀ X‖ of every column of U, [blocks, H, R], X the subject's keys: the singular values where U is their SVD's."""
    grams = statistics.vectors[UNSAFE, SUBJECT].gram["k"]

    def of_row(row: int) -> Tensor:
        own = bases[row].double()
        return (own * (grams[row].double() @ own)).sum(-2)

    return torch.stack(each_row(of_row, range(len(bases)))).clamp(min=0).sqrt().float()


def histogram(delta: Tensor) -> str:
    """How many heads have which Δ, in one line for people."""
    edges = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.01)
    ranges = [(low, high, ((delta >= low) & (delta < high)).sum().item()) for low, high in pairwise(edges)]
    filled = [f"{low:g} to {min(high, 1):g}: {count}" for low, high, count in ranges if count]
    return f"{', '.join(filled)} (largest {delta.max():.2f})"
