"""FLUX's queries and keys on their way through a protection: the one file that knows ComfyUI's attention hook.

ComfyUI calls every `attn1_patch` in every FLUX block with q and k [B, H, L, D] after QK-RMSNorm and before RoPE,
text tokens first (comfy/ldm/flux/layers.py, since ComfyUI 0.17.0).

Axis letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.math import apply_rope
from comfy.patcher_extension import WrappersMP

from ..saferope_core import BLOCK_TYPES, ROLES, Geometry, Protection

WRAPPER_KEY = "saferope"
POSITIVE = 0  # in extra_options["cond_or_uncond"], one entry for each chunk of the batch; 1 is negative
TEXT_END = "img_slice"  # extra_options["img_slice"] = [first image token, number of tokens]

Block = tuple[str, int]


class AttentionPatch:
    """Turns q and k of every protected block, and notices when it was not asked to.

    Text tokens are [0, img_slice[0]), image tokens [img_slice[0], L). Reference tokens (Kontext, FLUX.2) follow the
    generated image's and count as image tokens. q and k have their own L: a KV cache makes k the longer one.
    All rows of the batch are turned, whichever conditioning they belong to, or only those of positive prompts: the
    batch comes in as many equal chunks as `cond_or_uncond` has entries, 0 for positive.

    Steps: acts where percent_to_sigma(start) >= sigma > percent_to_sigma(end), so two nodes that meet at a percentage
    share no step; start == end acts nowhere. Sigmas come from the model as it samples, so a shift set by a later node
    counts. With the whole range no sigma is read (no wait for the GPU).

    Fails closed: torch.compile may replay a graph traced without the patch (ComfyUI's TorchCompileModel drops the
    guards that would notice), other nodes may replace blocks. `around_forward` checks that the first forward of each
    input shape in a sampling run went through every protected block; if not, the compiled graphs are dropped and
    the forward runs again, and if that does not help it raises RuntimeError. Later forwards of a known shape may be
    skipped, as step caches (EasyCache, TeaCache) do.

    One object serves all clones of a model and several threads. It has no `.to`: ComfyUI calls that on a copy of its
    list and with weight dtypes; the protection keeps one copy per device instead.
    """

    def __init__(self, protection: Protection, start: float = 0.0, end: float = 1.0, positive_only: bool = False):
        self.protection = protection
        self.protected = frozenset(block for block in _blocks(protection.geometry) if protection.covers(*block))
        self.start, self.end, self.positive_only = start, end, positive_only
        self._now = _Forward()
        self._proven: set[tuple] = set()

    @torch.compiler.disable
    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **kwargs) -> dict[str, torch.Tensor]:
        """q, k, v [B, H, L, D] -> the entries to replace: {"q": .., "k": ..} or {}. Raises RuntimeError without RoPE."""
        options = extra_options or {}
        block = (options.get("block_type"), options.get("block_index"))
        self._now.called.add(block)
        if block not in self.protected or not self._now.acting:
            return {}
        if pe is None or TEXT_END not in options:
            raise RuntimeError(
                f"SafeRoPE: block {block} was reached without "
                f"{'rotary positions' if pe is None else TEXT_END}. Expected q and k before RoPE and the span of the "
                "image tokens, as ComfyUI's own FLUX blocks give them. Remove the node that replaces FLUX's forward."
            )
        text = options[TEXT_END][0]
        turned = {"q": self._rotate(q, "q", block, text), "k": self._rotate(k, "k", block, text)}
        if self.positive_only:
            kinds = options["cond_or_uncond"]
            turned = {role: _in_chunks(kinds, x, turned[role]) for role, x in (("q", q), ("k", k))}
        return turned

    def around_forward(
        self, executor: Callable, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """APPLY_MODEL wrapper: decides once per forward whether to act, then checks that the patch was called."""
        acting = self._in_range(executor.class_obj.model_sampling, sigma)
        shape = _shape(x, *args, *kwargs.values())
        out, missing = self._run(acting, executor, x, sigma, *args, **kwargs)
        if missing and shape not in self._proven:
            del out
            torch._dynamo.reset()
            out, missing = self._run(acting, executor, x, sigma, *args, **kwargs)
            if missing:
                raise RuntimeError(
                    f"SafeRoPE was called in {len(self.protected - missing)} of the {len(self.protected)} blocks it "
                    f"protects (not in {min(missing)}), so this picture would not be protected. Expected: every block "
                    "calls its attention patches. Remove the node that replaces FLUX's blocks or its forward."
                )
        if not missing:
            self._proven.add(shape)
        return out

    def cleanup(self) -> None:
        """Called by ComfyUI after every sampling run, failed ones too."""
        self._proven.clear()
        self.protection.clear()

    def _rotate(self, x: torch.Tensor, role: str, block: Block, text: int) -> torch.Tensor:
        return self.protection.rotate(x, role, *block, text=(0, text), image=(text, x.shape[2]))

    def _run(self, acting: bool, executor: Callable, *args: Any, **kwargs: Any) -> tuple[Any, frozenset[Block]]:
        """The forward's output and the protected blocks that did not call the patch."""
        self._now.acting, self._now.called = acting, set()
        try:
            return executor(*args, **kwargs), self.protected - self._now.called
        finally:
            self._now.acting = True

    def _in_range(self, model_sampling: Any, sigma: torch.Tensor) -> bool:
        if (self.start, self.end) == (0.0, 1.0):
            return True
        first, last = (float(model_sampling.percent_to_sigma(p)) for p in (self.start, self.end))
        return first >= float(sigma.max()) > last


class _Forward(threading.local):
    """The forward a thread is in. Outside of one (a node that calls the model by itself) acting is the safe side."""

    def __init__(self) -> None:
        self.acting, self.called = True, set()


class ListeningPatch:
    """Shows q and k of every block to a function, and changes nothing.

    `at_sigma(sigma)` is asked before each forward for that function, None where the forward is of no interest. It is called
    as `listen(x, turned, role, block_type, block_index, text, image)`: x [B, H, L, D] before RoPE and `turned` after it, the
    spans of text and image tokens. Fails closed: RuntimeError where a block of a forward of interest was not heard.
    """

    def __init__(self, geometry: Geometry, at_sigma: Callable[[float], Callable | None]):
        self.blocks, self.at_sigma = frozenset(_blocks(geometry)), at_sigma
        self._listen: Callable | None = None
        self._heard: set[Block] = set()

    @torch.compiler.disable
    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **kwargs) -> dict[str, torch.Tensor]:
        """As AttentionPatch; always {}."""
        options = extra_options or {}
        if self._listen is not None and pe is not None and TEXT_END in options:
            block, text = (options.get("block_type"), options.get("block_index")), options[TEXT_END][0]
            for role, x, turned in zip(ROLES, (q, k), apply_rope(q, k, pe), strict=True):
                self._listen(x, turned, role, *block, (0, text), (text, x.shape[2]))
            self._heard.add(block)
        return {}

    def around_forward(
        self, executor: Callable, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """APPLY_MODEL wrapper: decides once per forward whether to listen, then checks that every block was heard."""
        self._listen, self._heard = self.at_sigma(float(sigma.max())), set()
        try:
            out = executor(x, sigma, *args, **kwargs)
            if self._listen is not None and self._heard != self.blocks:
                raise RuntimeError(
                    f"SafeRoPE heard queries and keys, before RoPE, of {len(self._heard)} of the model's {len(self.blocks)} blocks. "
                    "Expected every block to call its attention patches. Connect the model without nodes that compile it or "
                    "replace its blocks."
                )
            return out
        finally:
            self._listen = None


def patched(model: Any, patch: AttentionPatch | ListeningPatch) -> Any:
    """A clone of the ModelPatcher `model` with the patch after those it has; `model` itself is not changed."""
    clone = model.clone()
    clone.set_model_attn1_patch(patch)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, patch.around_forward)
    return clone


def _in_chunks(kinds: list[int], x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """`turned` in the chunks of positive prompts, `x` in the others; both [B, H, L, D]."""
    parts = zip(kinds, x.chunk(len(kinds)), turned.chunk(len(kinds)), strict=True)
    return torch.cat([after if kind == POSITIVE else before for kind, before, after in parts])


def _blocks(geometry: Geometry) -> list[Block]:
    counts = zip(BLOCK_TYPES, (geometry.double_blocks, geometry.single_blocks), strict=True)
    return [(block_type, index) for block_type, count in counts for index in range(count)]


def _shape(*values: Any) -> tuple:
    """What torch.compile tells inputs apart by: shapes, dtypes and devices of tensors, types of everything else."""
    return tuple((v.shape, v.dtype, v.device) if torch.is_tensor(v) else type(v) for v in values)
