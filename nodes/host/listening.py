"""Listens to a model's queries and keys, before and after RoPE, on the same hook as the attention patch.

Axes: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.math import apply_rope

from ...saferope_core import ROLES, Geometry
from .bridge import bridged
from .families import turns_by_position
from .network import TEXT_END, Block, block_of, blocks_of


class ListeningPatch:
    """Shows q and k of every block to a function, and changes nothing.

    `at_sigma(sigma)` is asked before each forward for that function, None where the forward is of no interest. It is
    called as `listen(x, turned, role, block_type, block_index, text, image)`: x [B, H, L, D] before RoPE and `turned`
    after it, the spans of text and image tokens. Fails closed: RuntimeError where a block of a forward of interest was
    not heard.
    """

    def __init__(self, geometry: Geometry, at_sigma: Callable[[float], Callable | None]) -> None:
        self.blocks, self.at_sigma, self.rope = frozenset(blocks_of(geometry)), at_sigma, turns_by_position(geometry)
        self._listen: Callable | None = None
        self._heard: set[Block] = set()

    @torch.compiler.disable
    def __call__(
        self, q: Any, k: Any, v: Any, pe: Any = None, attn_mask: Any = None, extra_options: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """As AttentionPatch; always {}."""
        options = extra_options or {}
        if self._listen is not None and TEXT_END in options and (pe is not None or not self.rope):
            block, text = block_of(options), options[TEXT_END][0]
            placed = apply_rope(q, k, pe) if self.rope else (q, k)
            for role, x, turned in zip(ROLES, (q, k), placed, strict=True):
                self._listen(x, turned, role, *block, (0, text), (text, x.shape[2]))
            self._heard.add(block)
        return {}

    def around_forward(self, executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL wrapper: decides once per forward whether to listen, then checks that every block was heard."""
        self._listen, self._heard = self.at_sigma(float(sigma.max())), set()
        try:
            with bridged(executor.class_obj.diffusion_model, self, (x, sigma, *args), kwargs) as (args, kwargs):
                out = executor(*args, **kwargs)
            if self._listen is not None and self._heard != self.blocks:
                raise RuntimeError(
                    f"SafeRoPE heard queries and keys, before RoPE, of {len(self._heard)} of the model's "
                    f"{len(self.blocks)} blocks. Expected every block to call its attention patches. Connect the model "
                    "without nodes that compile it or replace its blocks."
                )
            return out
        finally:
            self._listen = None
