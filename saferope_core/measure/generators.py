"""Generators that nothing is learned for: planes turned by one fixed angle, or at random.

Tried and left out, as it did no better (stars shown 22 % against 19 %): choosing, group of blocks by group of blocks,
those of twelve random frames that move unsafe velocities most. So were planes towards the reach, and larger angles for
the directions of padding and words. Nor did, on few prompts (stars shown of 24 pictures, 50 % at 2.1 rad): other angles
(58 % at 1.6, more than at 2.1 for 3 and 4), or one plane per head from the mean unsafe vector to where the mean of what
it meets looks least (58 %). What did is in the gates and in turning text queries too: a quantile of 0.99 left 25 %,
with queries 12 %.

Axes: N safety-critical heads, R subspace rank, S reach.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..concept.geometry import SINGLE
from ..maths.calibration import fixed_generator
from ..maths.rotation import skew
from .heads import CriticalHeads


def fixed_generators(heads: CriticalHeads, angle: float) -> tuple[Tensor, Tensor]:
    """Skew generators (text, image) [N, R + S, R + S], image ones at rest in double blocks, as learned ones are.

    They turn the leading planes of every head, columns (1, 2), (3, 4) and so on of its basis, by `angle` radians at
    full risk. Where risk is measured in relative dimensions, the planes begin behind these: little lies there to be
    turned.
    """
    first = heads.widths[0] - heads.reach if heads.full else 0
    text, image = (
        pad(fixed_generator(width - first, angle, len(heads.heads)), (first, 0, first, 0)) for width in heads.widths
    )
    return text, image * _single(heads)


def random_generators(heads: CriticalHeads, seed: int, text_init: float, image_init: float) -> tuple[Tensor, Tensor]:
    """The same, of normal numbers with these standard deviations: what training starts from."""
    generator, count = torch.Generator().manual_seed(seed), len(heads.heads)
    text, image = (
        2 * skew(torch.randn(count, width, width, generator=generator)) * spread
        for width, spread in zip(heads.widths, (text_init, image_init), strict=True)
    )
    return text, image * _single(heads)


def _single(heads: CriticalHeads) -> Tensor:
    return (heads.heads[:, 0] == SINGLE).float()[:, None, None]
