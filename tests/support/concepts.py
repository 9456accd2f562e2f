"""Concepts by the names of their tensors in a file, flat, as most tests state them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch


def concept_of(core: Any, **flat: Any) -> Any:
    """A Concept of `core` (there may be two copies of it) with `basis_q`, `gate_image_k`, `acts_on` and
    so on by name."""
    return core.Concept(**_streams(core, flat, {"text": {}, "image": {}}, {"text": "qk", "image": None}))


def in_all_heads(core: Any, geometry: Any) -> Any:
    """Random planes in all heads; open gates, where turning has no jump for rounding to decide about."""
    torch.manual_seed(0)
    blocks = [(0, i) for i in range(geometry.double_blocks)] + [(1, i) for i in range(geometry.single_blocks)]
    heads = [(*block, head) for block in blocks for head in range(geometry.heads)]
    basis = torch.linalg.qr(torch.randn(2, len(heads), geometry.head_dim, 4)).Q
    return concept_of(
        core,
        slug="star",
        name="Star",
        description="",
        geometry=geometry,
        heads=torch.tensor(heads, dtype=torch.int32),
        basis_q=basis[0],
        basis_k=basis[1],
        generator_text=core.skew(5 * torch.randn(len(heads), 4, 4)),
        generator_image=core.skew(5 * torch.randn(len(heads), 4, 4)),
        discrimination=torch.zeros(geometry.blocks, geometry.heads),
        threshold=0.0,
    )


def changed(concept: Any, **flat: Any) -> Any:
    """`dataclasses.replace` with names as in `concept_of`."""
    core = sys.modules[type(concept).__module__.rsplit(".", 2)[0]]
    streams = {"text": concept.text, "image": concept.image}
    tensors = {name: core.tensors_of(each, core.NAMES[name]) for name, each in streams.items()}
    return replace(concept, **_streams(core, flat, tensors, {name: each.acts_on for name, each in streams.items()}))


def field(concept: Any, name: str) -> Any:
    """A field of the concept or of its streams, by its name in a file."""
    core = sys.modules[type(concept).__module__.rsplit(".", 2)[0]]
    for stream, names in core.NAMES.items():
        own = core.tensors_of(getattr(concept, stream), names) | {names.acts_on: getattr(concept, stream).acts_on}
        if name in own:
            return own[name]
    return getattr(concept, name)


def _streams(core: Any, flat: dict, tensors: dict[str, dict], acts_on: dict[str, str | None]) -> dict:
    rest = dict(flat)
    for stream, names in core.NAMES.items():
        own = {names.generator}.union(*(vars(each).values() for each in (names.basis, names.gate, names.full)))
        new = tensors[stream] | {name: rest.pop(name) for name in own & rest.keys()}
        rest[stream] = core.stream_of(new, rest.pop(names.acts_on, acts_on[stream]), names)
    return rest
