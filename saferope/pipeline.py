"""Protection of a diffusers pipeline while a `with` block is open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from saferope_core import Concept, Protection, load_concepts, require_effect
from saferope_training.flux.attach import Span, attached, geometry_of, layout_of, sites

File = str | os.PathLike
Concepts = File | Concept | Sequence[File | Concept]
_MARK = "_saferope_protected"  # attribute of a transformer inside of a `protect` block


@contextmanager
def protect(pipe: Any, concepts: Concepts, strength: float = 1.0, threshold: float | None = None) -> Iterator[None]:
    """Turns the queries and keys of a diffusers pipeline, or of its transformer, while the block is open.

    concepts: concept files, Concepts, or a list of both. strength: factor on the risk, see `Protection`; 0, and an
    empty list, change nothing, bit for bit. threshold: one gate in [0, 1] for all heads, None for the gates of the
    concepts. The whole batch is protected, negative prompts of true CFG as well. After the block the pipeline is as it
    was before, bit for bit, also after an exception.

    Raises ValueError where `pipe` is of no family that SafeRoPE reaches (docs/models.md), is compiled, or is inside of
    another `protect`. Also where a concept was made for another geometry or has no effect at any strength (gates that
    nothing passes, angles near 0). To draw without protection, use strength 0. Raises RuntimeError where a forward pass
    left out a protected query or key, as a replaced attention does. Also at the end of a block in which the transformer
    never ran.
    """
    transformer = _transformer_of(pipe)
    loaded = _loaded(concepts)
    count = len(loaded)
    protection = Protection(loaded, geometry_of(transformer), [strength] * count, [threshold] * count)
    if not any(protection.effective):
        yield
        return
    for concept in loaded:
        require_effect(concept, threshold)
    setattr(transformer, _MARK, True)
    watch = _Watch(transformer, protection)
    try:
        with attached(transformer, watch.rotate), watch.watching():
            yield
    finally:
        delattr(transformer, _MARK)
    if not watch.forwards:
        raise RuntimeError(
            "protect: got a block in which the protected transformer never ran, expected at least one picture. Call "
            "the pipeline that you gave to protect, inside of the block."
        )


def _transformer_of(pipe: Any) -> nn.Module:
    transformer = getattr(pipe, "transformer", pipe)
    try:
        layout_of(getattr(transformer, "_orig_mod", transformer))
    except ValueError as error:
        raise ValueError(f"protect: {error}, or a pipeline with one") from None
    if hasattr(transformer, "_orig_mod") or any(each._compiled_call_impl for each in transformer.modules()):
        raise ValueError(
            "protect: got a compiled transformer, which may skip the protection, expected one as it was loaded"
        )
    if hasattr(transformer, _MARK):
        raise ValueError("protect: this transformer is protected already; give all concepts to one protect")
    return transformer


def _listed(concepts: Concepts) -> list[File | Concept]:
    return [concepts] if isinstance(concepts, (str, os.PathLike, Concept)) else list(concepts)


def _loaded(concepts: Concepts) -> list[Concept]:
    files = ([each] if isinstance(each, Concept) else load_concepts(each) for each in _listed(concepts))
    return [concept for file in files for concept in file]


class _Watch:
    """Rotates, and checks after every forward pass that all queries and keys that should turn were there."""

    def __init__(self, transformer: nn.Module, protection: Protection) -> None:
        self.transformer, self.protection, self.forwards = transformer, protection, 0
        self.expected = {
            (site.role, site.block_type, site.block_index, site.stream)
            for site in sites(transformer)
            if protection.covers(site.block_type, site.block_index)
        }
        self.seen: set[tuple[str, str, int, str]] = set()
        # no other hook has seen the vectors before they turn
        self.alone = not any(site.module._forward_hooks for site in sites(transformer))

    def rotate(self, x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> Tensor:
        """`Protection.rotate`, noted."""
        stream = "both" if block_type == "single" else "text" if text[1] else "image"
        self.seen.add((role, block_type, block_index, stream))
        own = self.alone and not x.requires_grad
        return self.protection.rotate(x, role, block_type, block_index, text, image, own=own)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the transformer itself, off however the block is left."""
        before = self.transformer.register_forward_pre_hook(lambda *_: self.seen.clear())
        after = self.transformer.register_forward_hook(lambda *_: self._check())
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _check(self) -> None:
        self.forwards += 1
        if missing := sorted(self.expected - self.seen):
            role, block_type, block_index, _ = missing[0]
            raise RuntimeError(
                f"protect: a forward pass left out {len(missing)} of {len(self.expected)} protected queries and keys, "
                f"such as {role} of {block_type} block {block_index}, expected all of them. An attention processor "
                "that does not call the block's QK-norms cannot be protected: take it away, and draw again."
            )
