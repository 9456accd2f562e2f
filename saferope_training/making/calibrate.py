"""Generators that nothing is learned for, as the settings choose them."""

from __future__ import annotations

from torch import Tensor

from saferope_core import CriticalHeads, fixed_generators, random_generators

from ..settings import Settings


def untrained(heads: CriticalHeads, settings: Settings) -> tuple[Tensor, Tensor]:
    """Skew generators (text, image): "fixed" planes turned by one angle, or the "random" ones that training starts
    from.
    """
    if settings.generator == "random":
        return random_generators(heads, settings.seed, settings.text_init, settings.image_init)
    return fixed_generators(heads, settings.angle)
