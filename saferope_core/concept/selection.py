"""Parts of a concept: some blocks, one stream. Blocks and streams that are left out stay bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from .concept import Concept
from .geometry import DOUBLE, SINGLE, Geometry

STREAM_CHOICES = ("both", "text", "image")
_PART = re.compile(r"([ds])([0-9]{1,4})(?:-([0-9]{1,4}))?")
_KINDS = {"d": DOUBLE, "s": SINGLE}


def parse_blocks(text: str, geometry: Geometry) -> frozenset[tuple[int, int]]:
    """(block type, block) of a selection such as "d0-18,s0-37": d double, s single blocks, both ends included.

    Empty text is all blocks. Raises ValueError for anything else, and for blocks that the geometry does not have.
    """
    counts = {DOUBLE: geometry.double_blocks, SINGLE: geometry.single_blocks}
    if not text.strip():
        return frozenset((kind, block) for kind, count in counts.items() for block in range(count))
    chosen: set[tuple[int, int]] = set()
    for part in text.lower().split(","):
        found = _PART.fullmatch(part.strip())
        if not found:
            raise ValueError(
                f"blocks: got {part.strip()!r:.60}, expected parts such as d0, d0-18 or s3-7, commas between"
            )
        kind, first = _KINDS[found[1]], int(found[2])
        last = int(found[3] or first)
        if not first <= last < counts[kind]:
            raise ValueError(
                f"blocks: got {part.strip()!r}, expected blocks from {found[1]}0 to {found[1]}{counts[kind] - 1} in "
                f"rising order: the model is {geometry.describe()}"
            )
        chosen |= {(kind, block) for block in range(first, last + 1)}
    return frozenset(chosen)


def restricted(concept: Concept, blocks: frozenset[tuple[int, int]], streams: str = "both") -> Concept | None:
    """The concept in these blocks and streams ("both", "text" or "image") alone; None where nothing is left to turn."""
    if streams not in STREAM_CHOICES:
        raise ValueError(f"streams: got {streams!r:.40}, expected one of {', '.join(STREAM_CHOICES)}")
    kept = torch.tensor([(kind, block) in blocks for kind, block, _ in concept.heads.tolist()])
    if not kept.any():
        return None
    image = concept.image and concept.image.at(kept)
    parts: dict[str, Any] = {"text": concept.text.at(kept), "image": image}
    parts |= {name: part and part.still() for name, part in parts.items() if streams not in ("both", name)}
    if not any(part is not None and part.generator.any() for part in parts.values()):
        return None
    values = concept.singular_values
    return replace(
        concept, heads=concept.heads[kept], singular_values=None if values is None else values[kept], **parts
    )
