"""The rotation while it is being learned: differentiable in its generators, equal to what the concept file will do."""

from __future__ import annotations

import torch
from torch import Tensor

from saferope_core import BLOCK_TYPES, Geometry, gated, latent_risk_score, rotate_by_generator

from .attach import Span
from .heads import CriticalHeads

SHARINGS = ("independent", "shared")


class TrainableRotation:
    """R(x) = B exp(s A) B^T + (I - B B^T), B = [U, reach], differentiable in A = W - W^T, which is exactly skew.

    `text` and `image` are the weights W [N, R + S, R + S]; where `image` is a number, image tokens turn by that many times the
    text's generators. In double blocks only text tokens turn, as in the paper's code. `rotate` has the signature that
    `attached` expects and agrees with `Protection.rotate` of the concept made from the same tensors.

    `spared` [B, L] bool, if set, are text tokens that stay as they are whatever their risk.
    """

    def __init__(
        self, heads: CriticalHeads, geometry: Geometry, acts_on: str, text: Tensor, image: Tensor | float
    ) -> None:
        self.heads, self.acts_on = heads, acts_on
        device = text.device
        self.basis = {role: basis.to(device) for role, basis in heads.basis.items()}
        self.gate = {role: gate.to(device) for role, gate in heads.gate.items()}
        self.single = (heads.heads[:, 0] == BLOCK_TYPES.index("single")).float()[:, None, None].to(device)
        self.text, self.image = text, image
        self.members = _members(heads.heads, device)
        self.spared: Tensor | None = None

    def generators(self) -> tuple[Tensor, Tensor]:
        """Skew generators A [N, R + S, R + S] for text and image tokens."""
        text = self.text - self.text.mT
        image = self.image - self.image.mT if isinstance(self.image, Tensor) else self.image * text
        return text, image * self.single

    def weights(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        return {"text": self.text, **({"image": self.image} if isinstance(self.image, Tensor) else {})}

    def rotate(self, x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> Tensor:
        """Turns x [B, H, L, D]; returns x itself where no critical head or no turning stream is."""
        members = self.members.get((block_type, block_index))
        if members is None or role not in self.acts_on or (block_type == "double" and text[0] == text[1]):
            return x
        index, head = members
        generators = [generator[index] for generator in self.generators()]
        turned = self._turn(x[:, head], role, index, (text, image), generators)
        return x.index_copy(1, head, turned)

    def _turn(self, x: Tensor, role: str, index: Tensor, spans: tuple[Span, Span], generators: list[Tensor]) -> Tensor:
        """All tokens of the block's critical heads x [B, h, L, D], text and image each by its own generators."""
        basis = self.basis[role][index]
        risk = basis[..., : basis.shape[-1] - self.heads.reach]
        scale = gated(latent_risk_score(x, risk), self.gate[role][index])
        if self.spared is not None:
            first, last = spans[0]
            kept = scale[:, :, first:last].masked_fill(self.spared[:, None].to(scale.device), 0.0)
            scale = torch.cat([scale[:, :, :first], kept, scale[:, :, last:]], dim=2)
        parts = [
            rotate_by_generator(x[:, :, first:last], basis, generator, scale[:, :, first:last])
            for (first, last), generator in zip(spans, generators, strict=True)
            if last > first
        ]
        return torch.cat(parts, dim=2)


def _members(heads: Tensor, device: torch.device) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(block type, block index) -> (rows of `heads`, head indices) of its critical heads."""
    members = {}
    for kind, block in {(int(kind), int(block)) for kind, block, _ in heads}:
        rows = ((heads[:, 0] == kind) & (heads[:, 1] == block)).nonzero()[:, 0]
        members[BLOCK_TYPES[kind], block] = (rows.to(device), heads[rows, 2].long().to(device))
    return members
