"""Reaches the queries and keys inside a diffusers FLUX transformer; the only file that knows its attention.

The outputs of the QK-norms are exactly the vectors SafeRoPE speaks of: normalised, not yet turned by RoPE, `[B, L, H,
D]`. Double blocks have a pair of norms for each stream (`norm_added_*` text, `norm_*` image); single blocks have one
pair for the whole sequence, text first. Forward hooks on them need no copy of diffusers' attention processor, so any
processor that calls the norms keeps working. Gradient checkpointing recomputes blocks in the backward pass: keep the
context open until `backward()` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from saferope_core import ROLES, Geometry

Span = tuple[int, int]  # first token and the one after the last, on the L axis of the tensor handed over
Visitor = Callable[[Tensor, str, str, int, Span, Span], "Tensor | None"]


class Site(NamedTuple):
    """One QK-norm and where it stands; `stream` is "text", "image" or "both" (text first)."""

    module: nn.Module
    role: str
    block_type: str
    block_index: int
    stream: str


def sites(transformer: Any) -> Iterator[Site]:
    """Every QK-norm of a FluxTransformer2DModel, in the order of the blocks."""
    for index, block in enumerate(transformer.transformer_blocks):
        for role in ROLES:
            yield Site(getattr(block.attn, f"norm_added_{role}"), role, "double", index, "text")
            yield Site(getattr(block.attn, f"norm_{role}"), role, "double", index, "image")
    for index, block in enumerate(transformer.single_transformer_blocks):
        for role in ROLES:
            yield Site(getattr(block.attn, f"norm_{role}"), role, "single", index, "both")


def geometry_of(transformer: Any) -> Geometry:
    """The geometry a concept must have to fit this FluxTransformer2DModel."""
    config = transformer.config
    return Geometry(config.num_layers, config.num_single_layers, config.num_attention_heads, config.attention_head_dim)


def positioned(transformer: Any, image_ids: Tensor) -> Callable[[Tensor, Span, Span], Tensor]:
    """A function that applies RoPE to x [B, H, L, D] with the spans of a visitor, as this attention does.

    Text tokens stand at position 0 (FLUX.1), where RoPE turns nothing; image tokens stand at `image_ids` [L, 3].
    """
    from diffusers.models.embeddings import apply_rotary_emb

    frequencies = transformer.pos_embed(image_ids)

    def apply(x: Tensor, text: Span, image: Span) -> Tensor:
        if image[0] == image[1]:
            return x
        turned = apply_rotary_emb(x[:, :, image[0] : image[1]], frequencies, sequence_dim=2)
        return torch.cat([x[:, :, : image[0]], turned, x[:, :, image[1] :]], dim=2)

    return apply


@contextmanager
def attached(transformer: Any, rotate: Visitor) -> Iterator[None]:
    """Lets `rotate` replace the queries and keys of every block while the context is open.

    `rotate(x [B, H, L, D], role, block_type, block_index, text, image)` has the signature of `Protection.rotate`; spans
    count tokens of the `x` handed over, a stream that is not in it has the span (0, 0). Returning `x` itself or None
    leaves the block untouched, bit for bit. Contexts may be nested: the inner one sees what the outer one made. The
    hooks come off however the context is left.
    """
    with ExitStack() as hooks:
        text_length = _TextLength()
        handle = transformer.register_forward_pre_hook(text_length.read, with_kwargs=True)
        hooks.callback(handle.remove)
        for site in sites(transformer):
            hooks.callback(site.module.register_forward_hook(_hook(site, rotate, text_length)).remove)
        yield


@contextmanager
def listening(transformer: Any, listen: Callable[[Tensor, str, str, int, Span, Span], None]) -> Iterator[None]:
    """Shows `listen` the detached queries and keys of every block, `[B, H, L, D]`, and changes nothing."""

    def visit(x: Tensor, *where: Any) -> None:
        listen(x.detach(), *where)

    with attached(transformer, visit):
        yield


class _TextLength:
    """How many text tokens the forward pass under way has; the single blocks' norms cannot tell."""

    def __init__(self) -> None:
        self.value: int | None = None

    def read(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        self.value = text.shape[1]


def _hook(site: Site, visit: Visitor, text_length: _TextLength) -> Callable:
    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        text, image = _spans(site.stream, output.shape[1], text_length.value)
        x = rearrange(output, "b l h d -> b h l d")
        turned = visit(x, site.role, site.block_type, site.block_index, text, image)
        # contiguous: attention kernels may pick another summation order for another memory layout
        return None if turned is None or turned is x else rearrange(turned, "b h l d -> b l h d").contiguous()

    return hook


def _spans(stream: str, length: int, text_length: int | None) -> tuple[Span, Span]:
    if stream == "text":
        return (0, length), (0, 0)
    if stream == "image":
        return (0, 0), (0, length)
    assert text_length is not None, "a single block ran outside its transformer's forward pass"
    return (0, text_length), (text_length, length)
