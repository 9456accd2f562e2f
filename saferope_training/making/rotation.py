"""The rotation in training: differentiable in its generators, and equal to the rotation by the later concept file."""

from __future__ import annotations

import torch
from torch import Tensor

from saferope_core import (
    BLOCK_TYPES,
    ROLES,
    CriticalHeads,
    Geometry,
    bounded,
    eigen,
    gated,
    latent_risk_score,
    rotate_by_generator,
    saturated,
)

from ..flux.attach import Span

Eigen = tuple[Tensor, Tensor]  # of generators, see `eigen`


class TrainableRotation:
    """R(x) = B exp(s A) B^T + (I - B B^T), B = [U, reach], differentiable in A = W - W^T, which is exactly skew.

    `text` and `image` are the weights W, as wide as their stream's bases; where `image` is a number, image tokens turn
    by that many times the text's generators. Image tokens turn in the blocks that `heads` names for it. `rotate`
    has the signature that `attached` expects and agrees with `Protection.rotate` of the same tensors' concept.

    `acts_on` has the roles that turn, "qk", "q" or "k", for "text" and "image".
    `strengths` [B] are the prompts', 1 if not set: s = min(1, strength * gated LRS / full).
    `spared` [B, L] bool, if set, marks text tokens that stay as they are at any risk.
    """

    def __init__(
        self, heads: CriticalHeads, geometry: Geometry, acts_on: dict[str, str], text: Tensor, image: Tensor | float
    ) -> None:
        self.heads, self.acts_on = heads, acts_on
        device = text.device
        self.basis = {role: basis.to(device) for role, basis in heads.basis.items()}
        self.gate = {role: gate.to(device) for role, gate in heads.gate.items()}
        self.full = {role: full.to(device) for role, full in heads.full.items()}
        self.turns_image = heads.turns_image.to(device)
        self.text, self.image = text, image
        self.own = "image_" if "image_k" in heads.basis else ""
        self.members = {role: _members(heads.heads, geometry.group if role == "k" else 1, device) for role in ROLES}
        self.spared: Tensor | None = None
        self.strengths: Tensor | None = None
        self._known: tuple[tuple, tuple[Eigen, ...]] | None = None

    def generators(self) -> tuple[Tensor, Tensor]:
        """Skew generators A [N, R + S, R + S] for text and image tokens."""
        text = self.text - self.text.mT
        image = self.image - self.image.mT if isinstance(self.image, Tensor) else self.image * text
        return text, image * self.turns_image

    def weights(self) -> dict[str, Tensor]:
        """The learned weights, by name."""
        return {"text": self.text, **({"image": self.image} if isinstance(self.image, Tensor) else {})}

    @torch.no_grad()
    def hold(self, angle: float) -> None:
        """Changes the weights so that no plane turns further than `angle` radians at s = 1; 0: no limit."""
        for weight in self.weights().values() if angle else ():
            generator = weight - weight.mT
            weight += (bounded(generator, angle) - generator) / 2  # the symmetric part of W, which turns nothing, stays

    def rotate(self, x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> Tensor:
        """Turns x [B, H of the role, L, D]; returns x itself where no critical head or no token of the block turns."""
        members = self.members[role].get((block_type, block_index))
        at_rest = text[0] == text[1] and BLOCK_TYPES[self.heads.image_blocks] != block_type
        if members is None or at_rest:
            return x
        index, head = members
        parts, chosen = {}, x[:, head]
        streams = zip(("text", "image"), (text, image), self.generators(), self._eigen(), strict=True)
        for stream, (first, last), generator, (theta, frame) in streams:
            if last > first:
                own = generator[index], (theta[index], frame[index])
                parts[first] = self._turn(chosen[:, :, first:last], role, stream, index, *own)
        return x.index_copy(1, head, torch.cat([parts[first] for first in sorted(parts)], dim=2))

    @torch.no_grad()
    def _eigen(self) -> tuple[Eigen, ...]:
        """The `eigen` of both streams' generators, computed anew where the weights have changed."""
        version = tuple((id(weight), weight._version) for weight in self.weights().values())
        if self._known is None or self._known[0] != version:
            self._known = version, tuple(eigen(generator) for generator in self.generators())
        return self._known[1]

    def _turn(self, x: Tensor, role: str, stream: str, index: Tensor, generator: Tensor, eigen: Eigen) -> Tensor:
        """One stream's tokens of the block's critical heads, x [B, h, L, D]."""
        if role not in self.acts_on[stream]:
            return x
        name = self.own + role if stream == "image" else role
        basis = self.basis[name][index]
        risk = basis[..., : basis.shape[-1] - self.heads.reach]
        strengths = torch.ones(1) if self.strengths is None else self.strengths
        factor = strengths.to(x.device)[:, None, None]
        if name in self.full:
            factor = factor / self.full[name][index][:, None]
        scale = saturated(gated(latent_risk_score(x, risk), self.gate[name][index]), factor)
        if stream == "text" and self.spared is not None:
            spared = self.spared[:, None, : scale.shape[2]]  # prompts may be shorter than the length of all
            scale = scale.masked_fill(spared.to(scale.device), 0.0)
        return rotate_by_generator(x, basis, generator, scale, eigen)


def _members(heads: Tensor, group: int, device: torch.device) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(block type, block index) -> (rows of `heads`, head indices) of its critical heads.

    Of every `group` only the first counts: a key head that query heads share turns as `Concept.owners` says.
    """
    members = {}
    for kind, block in {(int(kind), int(block)) for kind, block, _ in heads}:
        rows = ((heads[:, 0] == kind) & (heads[:, 1] == block)).nonzero()[:, 0]
        shared = heads[rows, 2].long() // group
        first = torch.cat([torch.ones(1, dtype=torch.bool), shared.diff() != 0])
        members[BLOCK_TYPES[kind], block] = (rows[first].to(device), shared[first].to(device))
    return members
