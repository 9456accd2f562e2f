"""Generators without training: planes turned by one fixed angle, or at random.

Tried and left out, since they did no better:

- choose, for each group of blocks, from twelve random frames the one that moves unsafe velocities most: 22 % of
  pictures showed stars, against 19 %
- planes towards the reach, and larger angles for the directions of padding and words
- on few prompts, where 50 % of 24 pictures showed stars at 2.1 rad, other angles: 58 % at 1.6 rad, and more than 50 %
  at 3 and 4 rad
- on the same prompts one plane per head, from the mean unsafe vector to the direction in which the mean of the vectors
  that it meets looks least: 58 %

Two changes did better on these prompts and are in use: a gate quantile of 0.99 left 25 %, and 12 % with text queries
turned too.

Axes: N safety-critical heads, R subspace rank, S reach.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..maths.calibration import fixed_generator
from ..maths.rotation import skew
from .heads import CriticalHeads


def fixed_generators(heads: CriticalHeads, angle: float) -> tuple[Tensor, Tensor]:
    """Skew generators (text, image) [N, R + S, R + S], image ones at rest where image tokens do not turn.

    They turn the leading planes of every head, columns (1, 2), (3, 4) and so on of its basis, by `angle` radians at
    full risk. Where risk is measured in relative dimensions, the planes begin behind these: little lies there to be
    turned.
    """
    first = heads.widths[0] - heads.reach if heads.full else 0
    text, image = (
        pad(fixed_generator(width - first, angle, len(heads.heads)), (first, 0, first, 0)) for width in heads.widths
    )
    return text, image * heads.turns_image


def random_generators(heads: CriticalHeads, seed: int, text_init: float, image_init: float) -> tuple[Tensor, Tensor]:
    """Generators of the same shapes, of normal numbers with these standard deviations: training starts from them."""
    generator, count = torch.Generator().manual_seed(seed), len(heads.heads)
    text, image = (
        2 * skew(torch.randn(count, width, width, generator=generator)) * spread
        for width, spread in zip(heads.widths, (text_init, image_init), strict=True)
    )
    return text, image * heads.turns_image
