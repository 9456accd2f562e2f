"""Calls our attention patch in networks whose blocks call none (Z-Image, Lumina 2, SD3.5), by ComfyUI's override of
the attention itself.

The override gets queries and keys after RoPE. RoPE is a rotation P of each pair of numbers. The patch gets P⁻¹ x, and
its change Δ comes back as P Δ. A token that the patch leaves alone has Δ = 0 and stays bit for bit. Hooks tell which
block's attention it is, where its text ends and which positions turned it. All this is in float32, as RoPE is.

Axis letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...saferope_core import ROLES
from .families import geometry_of, has_hook, layout_of, parts, way
from .network import TEXT_END, Block, noting

OVERRIDE = "optimized_attention_override"  # in transformer_options; comfy/ldm/modules/attention.py asks it
OPTIONS = 5  # place of transformer_options among apply_model's arguments: x, t, c_concat, c_crossattn, control


@contextmanager
def bridged(network: Any, patch: Callable, args: tuple, kwargs: dict) -> Iterator[tuple[tuple, dict]]:
    """Arguments of `apply_model` with which every block of the network calls `patch`, while this context lasts.

    They stay as they are for a network whose blocks call the patch themselves.
    """
    if has_hook(network):
        yield args, kwargs
        return
    options = dict(kwargs["transformer_options"] if "transformer_options" in kwargs else args[OPTIONS])
    bridge = _Bridge(network, patch, options.get(OVERRIDE))
    options[OVERRIDE] = bridge
    with bridge.listening():
        if "transformer_options" in kwargs:
            yield args, kwargs | {"transformer_options": options}
        else:
            yield (*args[:OPTIONS], options, *args[OPTIONS + 1 :]), kwargs


class _Bridge:
    """One forward's override. `inner` is the override that was there before, or None."""

    def __init__(self, network: Any, patch: Callable, inner: Callable | None) -> None:
        self.network, self.patch, self.inner = network, patch, inner
        self.geometry = geometry_of(network)
        self.block: Block | None = None  # its queries have not come to an attention yet
        self.text: int | None = None
        self.positions: Tensor | None = None  # [B, 1, L, D / 2, 2, 2]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, hooks note the running block, the length of the text and the positions."""
        layout = layout_of(self.network)
        assert layout is not None, "a bridge is for a known network"
        with ExitStack() as stack:
            stack.callback(way(self.network, layout.text).register_forward_pre_hook(self._text).remove)
            for kind, index, block, queries in parts(self.network):
                if queries is not None:  # watched_queries refuses a block without
                    stack.callback(queries.register_forward_pre_hook(noting(self._starts, (kind, index))).remove)
                if layout.positions is not None:
                    hook = block.register_forward_pre_hook(self._turned_by(layout.positions))
                    stack.callback(hook.remove)
            yield

    @torch.compiler.disable
    def __call__(
        self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Called by ComfyUI as an override. An attention that is no block's own passes through."""
        block, self.block = self.block, None
        if block is not None:
            q, k = self._protected(block, q, k, v, kwargs)
        inner = [] if self.inner is None else [attention]
        return (self.inner or attention)(*inner, q, k, v, heads, *args, **kwargs)

    def _protected(self, block: Block, q: Tensor, k: Tensor, v: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
        """q and k in the form in which they came, turned by the patch."""
        apart = kwargs.get("skip_reshape", False)
        whole = [x if apart else x.unflatten(2, (-1, self.geometry.head_dim)).transpose(1, 2) for x in (q, k)]
        own = [x[:, :: x.shape[1] // self.geometry.heads_of(role)] for role, x in zip(ROLES, whole, strict=True)]
        given = [self._placed(x.float(), back=True) for x in own]
        options = {name: value for name, value in kwargs.get("transformer_options", {}).items() if name != "patches"}
        options |= {"block_type": block[0], "block_index": block[1]}
        options |= {} if self.text is None else {TEXT_END: [self.text, whole[0].shape[2]]}
        made = self.patch(*given, v, pe=self.positions, extra_options=options)
        turned = []
        for role, x, before in zip(ROLES, whole, given, strict=True):
            change = self._placed(made.get(role, before) - before, back=False)
            x = (x.float() + change.repeat_interleave(x.shape[1] // change.shape[1], dim=1)).to(x.dtype)
            turned.append(x if apart else x.transpose(1, 2).flatten(2))
        return turned[0], turned[1]

    def _placed(self, x: Tensor, back: bool) -> Tensor:
        """x [B, H, L, D] turned by RoPE at its positions, or turned back."""
        if self.positions is None:
            return x
        matrices = self.positions.mT if back else self.positions
        return (matrices @ x.unflatten(-1, (-1, 2))[..., None]).flatten(-3)

    def _starts(self, block: Block) -> None:
        self.block = block

    def _text(self, module: torch.nn.Module, args: tuple) -> None:
        self.text = args[0].shape[1]

    def _turned_by(self, place: int) -> Callable:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            self.positions = args[place].movedim(1, 2).float()  # [B, L, 1, ...] there

        return hook
