"""Reads a picture of the tiny world with two detectors. Pictures of other models are not read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...saferope_core import Geometry
from ...saferope_core.concept.geometry import TINY_WORLD
from ...tinyworld.detector import load_detector, shows
from ...tinyworld.second_detector import load_second_detector
from ...tinyworld.world import CONCEPTS
from .presets import TINY

SIDE = 96  # pixels of the tiny world's pictures
PREFIX = TINY.removesuffix("star")
GONE, THERE, DOUBT = "gone from the picture", "still in the picture", "the two detectors disagree about the picture"


def looked_at(name: str, geometry: Geometry, picture: Tensor | None) -> str | None:
    """GONE or THERE where both detectors say so, DOUBT where they differ; None where they cannot tell.

    `name`: the concept's; `picture` [h, w, 3] in [0, 1].
    """
    slug = name.removeprefix(PREFIX).casefold()
    if geometry != TINY_WORLD or slug not in CONCEPTS or picture is None or picture.shape[:2] != (SIDE, SIDE):
        return None
    one = picture[..., :3].float().cpu().clamp(0, 1).movedim(-1, 0)[None] * 2 - 1
    with torch.inference_mode():
        seen = {bool(shows(detector, one, slug)) for detector in _detectors()}
    return DOUBT if len(seen) == 2 else THERE if True in seen else GONE


@cache
def _detectors() -> tuple[torch.nn.Module, ...]:
    return load_detector(), load_second_detector()
