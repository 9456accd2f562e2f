"""The effect of concept files, for the audit of workflows: their own unsafe directions, sent through Apply nodes in a
row.

`in_folder` gives the files, and this module is the `Effect` of each (see `workflow_lint.effect`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from saferope_core import BLOCK_TYPES, Concept, Protection, parse_blocks, restricted, taken_apart
from saferope_core.concept.concept_file import MAX_BYTES, parse_concepts
from saferope_core.concept.untrusted import read_whole
from workflow_lint.effect import File, Files

# A token that is nearly all unsafe: a gate above it lets everything through. The tiny world's gates reach 0.953.
PROBE_RISK = 0.99
# How far a vector of length 1 must move: what the smallest step of a strength (0.05) makes of a turn by 1 radian.
LEAST_TURN = 0.05
__all__ = ["in_folder", "rotations", "scaled", "taken_apart", "turned"]


def in_folder(folder: Path) -> Files:
    """The concept files of a folder. Those outside of it are never looked at, wherever links or names lead."""
    root = folder.resolve()

    @cache
    def find(name: str) -> File | str:
        for spelled in (name, name.replace("\\", "/")):  # Windows writes sub\star.safetensors
            try:
                path = (root / spelled).resolve()
                if not path.is_relative_to(root) or not path.is_file():
                    continue
                data = read_whole(path, MAX_BYTES)
                return File(hashlib.sha256(data).hexdigest(), tuple(parse_concepts(data)), sys.modules[__name__])
            except (OSError, ValueError) as error:  # a name that no file can have, or no concept file
                return f"the file there cannot be read ({error})"
        return "there is no file of this name in the folder of concepts"

    return find


def rotations(
    concepts: Sequence[Concept], strength: float, threshold: float | None, blocks: str, streams: str
) -> Protection | None:
    """The protection of an Apply with these settings; None: none. Raises ValueError where ComfyUI would stop with an
    error.
    """
    geometry = concepts[0].geometry
    for each in concepts:
        geometry.require(each.geometry, f"concept {each.slug!r}")
    chosen = parse_blocks(blocks, geometry)
    kept = [part for each in concepts if (part := restricted(each, chosen, streams)) is not None]
    count = len(kept)
    return Protection(kept, geometry, [strength] * count, [threshold] * count) if kept else None


def turned(concepts: Sequence[Concept], chain: Sequence[Protection]) -> tuple[int, int]:
    """(heads in which any unsafe direction of these concepts is moved by the chain, heads that they have)."""
    moved = [_moved(each, chain) for each in concepts]
    return sum(int((far >= LEAST_TURN).sum()) for far in moved), sum(len(far) for far in moved)


def _moved(concept: Concept, chain: Sequence[Protection]) -> Tensor:
    """How far each head's probes move at most, [N]."""
    far = torch.zeros(len(concept.heads))
    for stream in ("text", "image"):
        for role in concept.acts(stream):
            probes = _probes(concept.basis(role, stream), concept.reach)
            for kind, index in concept.heads[:, :2].unique(dim=0).tolist():
                here = (concept.heads[:, :2] == torch.tensor([kind, index])).all(1) & concept.owners(role)
                count = concept.geometry.heads_of(role)
                heads = concept.heads[here, 2].long() // (concept.geometry.heads // count)
                x = torch.zeros(1, count, *probes.shape[1:])
                x[0, heads] = probes[here]
                spans = {"text": (0, 0), "image": (0, 0), stream: (0, x.shape[2])}
                y = x
                for each in chain:
                    y = each.rotate(y, role, BLOCK_TYPES[kind], index, spans["text"], spans["image"])
                lengths = torch.linalg.vector_norm(y - x, dim=-1).amax(-1)[0, heads]
                far[here] = torch.maximum(far[here], lengths)
    return far


def _probes(bases: Tensor, reach: int) -> Tensor:
    """Vectors [N, R, D] of length 1 and risk PROBE_RISK, one along each unsafe direction of bases [N, D, R + S]."""
    unsafe = bases[..., : bases.shape[-1] - reach].mT
    if bases.shape[-1] == bases.shape[-2]:
        return unsafe  # nothing lies outside
    outside = torch.linalg.qr(bases, mode="complete").Q[..., -1]
    return PROBE_RISK**0.5 * unsafe + (1 - PROBE_RISK) ** 0.5 * outside[:, None]


def scaled(concepts: Sequence[Concept], strength: float) -> list[Concept]:
    """With a Load node's strength."""
    return [replace(each, strength=each.strength * strength) for each in concepts]
