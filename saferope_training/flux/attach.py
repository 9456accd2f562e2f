"""Reaches the queries and keys inside a diffusers transformer; the only file that knows its attention.

SafeRoPE's vectors are the outputs of the QK-norms: normalised, not yet turned by RoPE, `[B, L, H, D]`. Double blocks
have a pair of norms for each stream; single blocks have one pair for the whole sequence. Forward hooks on them need no
copy of diffusers' attention processor, so any processor that calls the norms keeps working.
Gradient checkpointing recomputes blocks in the backward pass: keep the context open until `backward()` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from saferope_core import ROLES, Geometry

Span = tuple[int, int]  # first token and the one after the last, on the L axis of the tensor handed over
Turns = tuple[Tensor, Tensor]  # cosines and sines of RoPE [L, D], each pair's twice
Visitor = Callable[[Tensor, str, str, int, Span, Span], "Tensor | None"]


class Site(NamedTuple):
    """One QK-norm and where it stands; `stream` is "text", "image" or "both"."""

    module: nn.Module
    role: str
    block_type: str
    block_index: int
    stream: str


class Layout(NamedTuple):
    """The names that a class of diffusers gives to its lists of blocks and to a block's attention.

    - `text` finds the length of the text in a forward pass: a module's path, and the place of its argument [B, L, ...].
    - `ends`: text follows the picture in single blocks.
    - `heads_first`: norms give [B, H, L, D].
    - `pictures`: path of a module that sees whether pictures of a batch differ in size, or have references (`_alike`).
      Where there is one, the text's module sees whether prompts differ in length.
    """

    family: str
    double: str = "transformer_blocks"
    single: str = "single_transformer_blocks"
    attention: str = "attn"
    text: tuple[str, int] = ("", 1)  # the transformer itself; by keyword `encoder_hidden_states` too
    ends: bool = False
    heads_first: bool = False
    pictures: str = ""


LAYOUTS = {
    "FluxTransformer2DModel": Layout("flux"),
    "Flux2Transformer2DModel": Layout("flux2"),
    "Flux3Transformer2DModel": Layout("flux3", double="txt_mode_blocks"),
    "ChromaTransformer2DModel": Layout("chroma"),
    "LongCatImageTransformer2DModel": Layout("longcat-image"),
    "OvisImageTransformer2DModel": Layout("ovis-image"),
    "HunyuanImageTransformer2DModel": Layout("hunyuan-image", text=("single_transformer_blocks.0", 1), ends=True),
    "QwenImageTransformer2DModel": Layout("qwen-image", single=""),
    "Krea2Transformer2DModel": Layout("krea2", double="", single="transformer_blocks"),
    "ZImageTransformer2DModel": Layout(
        "z-image",
        double="",
        single="layers",
        attention="attention",
        text=("context_refiner.0", 0),
        ends=True,
        pictures="noise_refiner.0",
    ),
    "SD3Transformer2DModel": Layout("sd3", single="", heads_first=True),
}


# List of blocks -> the name of its length in a configuration
_COUNTS = {
    "transformer_blocks": "num_layers",
    "txt_mode_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
    "layers": "n_layers",
}


def layout_of(transformer: Any) -> Layout:
    """The layout of a transformer's class, or of the first known class that it derives from. ValueError without one."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in LAYOUTS:
            return LAYOUTS[cls.__name__]
    raise ValueError(f"got a {type(transformer).__name__}, expected one of {', '.join(LAYOUTS)}")


def sites(transformer: Any) -> Iterator[Site]:
    """Every QK-norm of a transformer of a known class, in the order of the blocks."""
    layout = layout_of(transformer)
    for index, norms in enumerate(_doubles(transformer, layout)):
        for role in ROLES:
            for attention, norm, stream in norms:
                yield Site(getattr(attention, f"{norm}_{role}"), role, "double", index, stream)
    for index, block in enumerate(_blocks(transformer, layout.single)):
        for role in ROLES:
            yield Site(getattr(getattr(block, layout.attention), f"norm_{role}"), role, "single", index, "both")


def geometry_of(transformer: Any) -> Geometry:
    """The geometry a concept must have to fit this transformer."""
    layout = layout_of(transformer)
    double, single = len(_doubles(transformer, layout)), len(_blocks(transformer, layout.single))
    return _geometry(layout, transformer.config, double, single)


def geometry_from(config: dict) -> Geometry:
    """The geometry of a transformer's configuration, by its `_class_name`. ValueError for an unknown class."""
    layout = _named(config)
    double, single = (config[_COUNTS[name]] if name else 0 for name in (layout.double, layout.single))
    return _geometry(layout, config, double, single)


def with_blocks(config: dict, double: int, single: int) -> dict:
    """The configuration with these numbers of blocks; a kind that the class does not have is left out."""
    layout = _named(config)
    counts = ((layout.double, double), (layout.single, single))
    return {**config, **{_COUNTS[name]: count for name, count in counts if name}}


def _named(config: dict) -> Layout:
    name = config.get("_class_name", "FluxTransformer2DModel")
    if name not in LAYOUTS:
        raise ValueError(f"got a {name!r:.80}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _geometry(layout: Layout, config: Any, double: int, single: int) -> Geometry:
    heads = config.get("num_attention_heads") or config["n_heads"]  # Z-Image's name for it
    keys = config.get("num_key_value_heads") or config.get("n_kv_heads")
    head_dim = config.get("attention_head_dim") or config["dim"] // heads
    return Geometry(double, single, heads, head_dim, layout.family, keys)


def _blocks(transformer: Any, name: str) -> Sequence[Any]:
    return getattr(transformer, name) if name else ()


def _doubles(transformer: Any, layout: Layout) -> list[list[tuple[Any, str, str]]]:
    """Each double block's list of (attention, name of its norms, stream). FLUX.3 has a block for each stream there."""
    if layout.family == "flux3":
        own = [(transformer.txt_mode_blocks, "text"), *((each, "image") for each in transformer.mode_blocks.values())]
        return [[(blocks[i].attn, "norm", stream) for blocks, stream in own] for i in range(len(own[0][0]))]
    return [
        [(getattr(block, layout.attention), "norm_added", "text"), (getattr(block, layout.attention), "norm", "image")]
        for block in _blocks(transformer, layout.double)
    ]


def positioned(text_turns: Turns | None, image_turns: Turns) -> Callable[[Tensor, Span, Span], Tensor]:
    """A function that applies RoPE to x [B, H, L, D] with the spans of a visitor, as this attention does.

    Turns are cosines and sines [L, D] of a stream's tokens, or [B, L, D] where prompts differ in them. None: the tokens
    stand at position 0, where RoPE turns nothing, as FLUX.1's text tokens do.
    """

    def apply(x: Tensor, text: Span, image: Span) -> Tensor:
        for (first, last), turns in ((text, text_turns), (image, image_turns)):
            if first < last and turns is not None:
                turned = _turned(x[:, :, first:last], *turns)
                x = torch.cat([x[:, :, :first], turned, x[:, :, last:]], dim=2)
        return x

    return apply


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, H, L, D] in pairs of neighbours, in fp32, as x's dtype."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-b, a], dim=-1).flatten(-2)
    cos, sin = (each.to(x.device).unsqueeze(-3) for each in (cos, sin))
    return (x.float() * cos + across * sin).to(x.dtype)


@contextmanager
def attached(transformer: Any, rotate: Visitor) -> Iterator[None]:
    """Lets `rotate` replace the queries and keys of every block while the context is open.

    `rotate(x [B, H, L, D], role, block_type, block_index, text, image)` has the signature of `Protection.rotate`. Spans
    count the tokens of this `x`; a stream that is not in it has the span (0, 0). If `rotate` returns `x` itself or
    None, the block stays untouched, bit for bit. Contexts may be nested: the inner one sees the outer one's result.
    The hooks come off on every exit, also after an error.

    Where the prompts of a batch differ in length (Z-Image), the text's span is that of the longest one. No token
    attends to the places behind a shorter prompt, and `rotate` sees 0 there. Z-Image with pictures of several sizes, or
    with reference pictures, raises RuntimeError in its forward pass.
    """
    with ExitStack() as hooks:
        layout = layout_of(transformer)
        text_length = _TextLength(layout)
        teller = transformer.get_submodule(layout.text[0])
        hooks.callback(teller.register_forward_pre_hook(text_length.read, with_kwargs=True).remove)
        if layout.pictures:
            hooks.callback(transformer.get_submodule(layout.pictures).register_forward_pre_hook(_alike).remove)
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


def _alike(_module: nn.Module, args: tuple) -> None:
    """Raises RuntimeError where Z-Image's picture blocks get a mask of tokens, or marks of noisy tokens: its pictures
    differ in size, or some are references."""
    if any(mark is not None for mark in (args[1], *args[4:5])):
        raise RuntimeError(
            "got pictures of several sizes, or reference pictures, in one batch of Z-Image, expected pictures of one "
            "size and no references; draw them one after the other, without references"
        )


class _TextLength:
    """The number of text tokens in the running forward pass. The norms of single blocks do not see it.

    `behind` [B, L], bool, marks the places behind the shorter prompts of a batch whose prompts differ in length.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.value: int | None = None
        self.behind: Tensor | None = None

    def read(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[self.layout.text[1]]
        self.value = text.shape[1]
        self.behind = ~args[1] if self.layout.pictures and args[1] is not None else None

    def shown(self, x: Tensor) -> Tensor:
        """x [B, H, L, D] of pictures and the text behind them, with 0 in the places that no prompt has."""
        if self.behind is None:
            return x
        return x.masked_fill(pad(self.behind, (x.shape[2] - self.behind.shape[1], 0))[:, None, :, None], 0.0)


def _hook(site: Site, visit: Visitor, text_length: _TextLength) -> Callable:
    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        x = output if text_length.layout.heads_first else rearrange(output, "b l h d -> b h l d")
        text, image = _spans(site.stream, x.shape[2], text_length)
        # a visitor may write into its x: where that is a copy, the result counts even if it is x itself
        turned = visit(text_length.shown(x), site.role, site.block_type, site.block_index, text, image)
        if turned is None or turned is x:
            return None
        # contiguous: attention kernels may pick another summation order for another memory layout
        return turned if text_length.layout.heads_first else rearrange(turned, "b h l d -> b l h d").contiguous()

    return hook


def _spans(stream: str, length: int, text_length: _TextLength) -> tuple[Span, Span]:
    if stream == "text":
        return (0, length), (0, 0)
    if stream == "image":
        return (0, 0), (0, length)
    text = text_length.value
    assert text is not None, "a single block ran outside its transformer's forward pass"
    if text_length.layout.ends:
        return (length - text, length), (0, length - text)
    return (0, text), (text, length)
