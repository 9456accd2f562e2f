"""Generators that nothing is learned for: planes turned by one fixed angle, or at random.

Tried and left out, as it did no better (stars shown 22 % against 19 %): choosing, group of blocks by group of blocks, those of
twelve random frames that move unsafe velocities most. So were planes towards the reach, and larger angles for the
directions of padding and words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saferope_core import BLOCK_TYPES, fixed_generator, skew

from .heads import CriticalHeads
from .settings import Settings


def untrained(heads: CriticalHeads, settings: Settings) -> tuple[Tensor, Tensor]:
    """Skew generators (text, image), image ones at rest in double blocks, as learned ones are.

    "fixed" turns the leading planes of every head, columns (1, 2), (3, 4) and so on of its basis, by `angle` at LRS 1;
    "random" is what training starts from.
    """
    count, widths = len(heads.heads), _widths(heads)
    single = (heads.heads[:, 0] == BLOCK_TYPES.index("single")).float()[:, None, None]
    if settings.generator == "random":
        generator = torch.Generator().manual_seed(settings.seed)
        spreads = (settings.text_init, settings.image_init)
        text, image = (
            2 * skew(torch.randn(count, width, width, generator=generator)) * spread
            for width, spread in zip(widths, spreads, strict=True)
        )
    else:
        text, image = (fixed_generator(width, settings.angle, count) for width in widths)
    return text, image * single


def _widths(heads: CriticalHeads) -> tuple[int, int]:
    return heads.basis["k"].shape[-1], heads.basis.get("image_k", heads.basis["k"]).shape[-1]
