"""Turns queries and keys at ComfyUI's attention hook. No other file knows this hook.

ComfyUI calls every `attn1_patch` in every block of FLUX and its kind with q and k [B, H, L, D] after QK-norm and before
RoPE, text tokens first (comfy/ldm/flux/layers.py, since ComfyUI 0.17.0). For keys H is the number of key heads.
`bridge.py` calls the patch for networks that do not.

Axis letters: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...saferope_core import Asked, Forward, Protection, Receipt, Run
from .bridge import bridged
from .families import grid_of
from .forward import ForwardState
from .guard import guard, protected_forward
from .listening import ListeningPatch
from .network import (
    TEXT_END,
    WRAPPER_KEY,
    Block,
    block_of,
    blocks_of,
    dtype_of_queries,
    is_compiled,
    require_hook,
    require_network,
    suspects,
    watched_queries,
)
from .notices import notice, rested, start_notices
from .receipts import Pass, receipt_of
from .recorder import Recorder, digest_of, require_usual
from .strangers import hooked, strangers
from .traced import chained, turn

POSITIVE = 0  # in extra_options["cond_or_uncond"], one entry for each chunk of the batch; 1 is negative


class AttentionPatch:
    """Turns q and k of every protected block, and notices where a block did not call it.

    Text tokens are [0, img_slice[0]), image tokens [img_slice[0], L). Reference tokens (Kontext, FLUX.2) follow the
    generated image's and count as image tokens. q and k have their own L: a KV cache makes k the longer one.
    It turns all rows of the batch, or only the rows of positive prompts. The batch has as many equal chunks as
    `cond_or_uncond` has entries, 0 for positive.

    Steps: it acts where percent_to_sigma(start) >= sigma > percent_to_sigma(end). So two nodes that meet at a
    percentage share no step, and start == end acts nowhere. Start 0 and end 1 are no limits: samplers may ask for
    sigmas above 1, and below 0. Sigmas come from the model as it samples, so a shift set by a later node counts. With
    the whole range no sigma is read (no wait for the GPU). A run without a step in the range ends in a notice.

    It fails closed. Two things can go wrong:

    - torch.compile may replay a graph traced without the patch. ComfyUI's TorchCompileModel drops the guards that
      would notice. See traced.py for the patch in a graph.
    - Other nodes may replace blocks, the forward or the network.

    `around_forward` audits every forward. The first one of a sampling run must go through every protected block. Later,
    step caches (EasyCache, TeaCache) and skip-layer guidance may leave blocks out. In no forward may a protected block
    project queries that do not come to the patch. A forward that a compiled graph may hide runs again without it, and
    the graphs are dropped if they were to blame. If queries still miss the patch, RuntimeError names the nodes to move.
    `around_sampling` raises where it saw no forward at all, guard.py where the network runs outside of a forward.

    One object serves all clones of a model and several threads. The evidence of a sampling run is kept with that run.
    The patch has no `.to`: ComfyUI calls that on a copy of its list and with weight dtypes. The protection keeps one
    copy per device instead.

    `recorder` gets the risk of each run, unless it is off. It also gets a receipt if `asked`, the settings of Apply, is
    known. A patch that is only `watching` turns nothing.
    """

    def __init__(
        self,
        protection: Protection,
        start: float = 0.0,
        end: float = 1.0,
        positive_only: bool = False,
        recorder: Recorder | None = None,
        watching: bool = False,
        asked: Asked | None = None,
    ) -> None:
        self.protection, self.recorder, self.watching, self.asked = protection, recorder, watching, asked
        self.protected = frozenset(block for block in blocks_of(protection.geometry) if protection.covers(*block))
        self.start, self.end, self.positive_only = start, end, positive_only
        self._now = ForwardState()
        self._run_key = f"{WRAPPER_KEY} {id(self)}"  # of this patch's _Run in transformer_options

    def __call__(
        self,
        q: Any,
        k: Any = None,
        v: Any = None,
        pe: Any = None,
        attn_mask: Any = None,
        extra_options: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """q, k, v [B, H, L, D] -> the entries to replace: {"q": .., "k": ..} or {}. Raises RuntimeError for a hook of
        another kind: other blocks, shapes or spans, or vectors after RoPE."""
        options: dict = extra_options if isinstance(extra_options, dict) else {}
        if torch.compiler.is_compiling() and self._traceable(q, k, options):
            return self._traced(q, k, pe is not None, options)
        return self._answer(q, k, pe, options)

    def _traceable(self, q: Any, k: Any, options: dict) -> bool:
        """Whether `traced.turn` can do it. Other calls leave the graph: odd ones, to be refused, and settings that
        need more than the vectors."""
        usual = torch.is_tensor(q) and torch.is_tensor(k) and TEXT_END in options and "block_type" in options
        return usual and not (self.watching or self.positive_only or q.requires_grad or k.requires_grad)

    def _traced(self, q: torch.Tensor, k: torch.Tensor, placed: bool, options: dict) -> dict[str, torch.Tensor]:
        """As `_answer`, in a graph."""
        if not self._owns(options):
            q, k = q.clone(), k.clone()
        place = 0
        for patch in options.get("patches", {}).get("attn1_patch") or []:
            if patch is self:
                break
            place += isinstance(patch, AttentionPatch)
        turn(q, k, place, *block_of(options), *options[TEXT_END], placed)
        return {"q": q, "k": k}

    def turn_in_place(self, q: torch.Tensor, k: torch.Tensor, block: Block, span: list[int], placed: bool) -> None:
        """Called by `traced.turn`. A patch that `_traceable` would refuse does not answer. Then its audit misses the
        block, and runs the forward without the graph."""
        if self.watching or self.positive_only:
            return
        self._now.answer(block)
        options = {TEXT_END: span}
        require_hook(self.protection.geometry, block, q, k, placed or None, options, self._now.network)
        if block in self.protected and self._now.acting:
            for role, x in (("q", q), ("k", k)):
                self._rotate(x, role, block, span[0], own=True)

    @torch.compiler.disable(reason="SafeRoPE for positive prompts alone leaves the graph: switch fullgraph off")
    def _answer(self, q: Any, k: Any, pe: Any, options: dict) -> dict[str, torch.Tensor]:
        block = block_of(options)
        self._now.answer(block)
        require_hook(self.protection.geometry, block, q, k, pe, options, self._now.network)
        if block not in self.protected or not self._now.acting:
            return {}
        if self.positive_only:
            kinds, run = options["cond_or_uncond"], options.get(self._run_key)
            if run is None:  # outside of a sampling run the numbers may mean anything
                require_usual(None)
            else:
                _require_chunks(q, run.pictures, kinds)
        text, own = options[TEXT_END][0], self._owns(options)
        turned = {role: self._rotate(x, role, block, text, own) for role, x in (("q", q), ("k", k))}
        if self.watching:
            return {}
        if self.positive_only:
            turned = {role: _in_chunks(kinds, x, turned[role]) for role, x in (("q", q), ("k", k))}
        return turned

    def around_sampling(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """OUTER_SAMPLE wrapper: gives the run a `_Run`, checks that a forward came by, keeps record and receipt."""
        guider = executor.class_obj
        records = self.recorder is not None and not self.recorder.off
        run = _Run(Run(self.protection.geometry) if records else None, pictures=len(noise))
        start = digest_of(latent) if torch.is_tensor(latent) and bool(latent.any()) else ""
        start_notices()
        if self.positive_only:
            require_usual(guider)
        guider.model_options.setdefault("transformer_options", {})[self._run_key] = run
        out = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        if not run.passes and len(sigmas) > 1:
            options = guider.model_options.get("transformer_options", {})
            raise RuntimeError(
                "SafeRoPE saw no forward of the model in this sampling run, so the picture is not protected. Expected: "
                f"every forward goes through apply_model. {suspects(guider.model_patcher, options)}"
            )
        if run.passes and not run.acted:
            notice(rested(self.protection.concepts, self.start, self.end))
        if self.recorder is not None:
            others = [sampler, (*args, *kwargs.values())]
            self.recorder.keep(run.record, out, guider, self._receipt(run, guider, start, out, sigmas, others))
        return out

    def _receipt(self, run: _Run, guider: Any, start: str, out: Any, sigmas: Any, others: list) -> Receipt | None:
        """The settings and the facts of the run. None for a patch that only watches, and for a run without a step."""
        if self.asked is None or not run.passes:
            return None
        sampler, arguments = others
        undone = [patch.asked.undone for patch in run.chain if patch.asked]
        asked = replace(self.asked, undone=tuple(dict.fromkeys(sentence for each in undone for sentence in each)))
        found = strangers(guider, sampler, arguments, run.options)
        latents, patcher = (digest_of(out), start), guider.model_patcher
        return receipt_of(asked, latents, run.passes, sigmas, len(self.protected), run.record, found, patcher)

    def around_forward(self, executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL wrapper: decides once per forward whether to act, then checks that the patch was called."""
        model, options = executor.class_obj, _transformer_options(args, kwargs)
        require_network(model, self.protection.geometry, options)
        run = options.get(self._run_key) or _Run()
        run.meet(options)
        run.compiled = run.compiled or is_compiled(model.current_patcher, options)
        acting = self._in_range(model.model_sampling, sigma)
        run.acted = run.acted or acting

        # before the network runs: a CUDA graph holds no copies to the device
        self.protection.prepare(x.device, dtype_of_queries(model))
        record = run.blank(model, x, sigma, options)
        untouched = x.clone()  # EasyCache adds to x in place
        out = self._run(model, acting, record, run.chain, executor, untouched, sigma, *args, **kwargs)
        missing = self.protected - self._now.called
        if (missing and run.compiled) or self._passed_by(run):
            del out
            record = run.blank(model, x, sigma, options)
            with torch.compiler.set_stance("force_eager"):  # shows blocks that a compiled graph hides
                out = self._run(model, acting, record, run.chain, executor, x, sigma, *args, **kwargs)
            if self._passed_by(run):
                raise RuntimeError(self._complaint(model, options))
            if self._now.projected:
                torch._dynamo.reset()  # the graph was traced without the patch
        whole = self.protected <= self._now.called
        run.passes.append(Pass(sigma.max(), acting, whole, len(options.get("cond_or_uncond", ()))))
        run.whole = run.whole or whole
        run.compiled = run.compiled or bool(self.protected & self._now.called - self._now.projected)
        if run.record is not None and record is not None:
            run.record.add(record)
        return out

    def cleanup(self) -> None:
        """Called by ComfyUI after every sampling run, failed ones too."""
        self.protection.clear()

    def _owns(self, options: dict) -> bool:
        """Whether q and k may be written to. The block made them for its patches, ours is the first to get them, and
        no caller needs them unturned."""
        patches = options.get("patches", {}).get("attn1_patch") or [None]
        return patches[0] is self and not self.watching and not self.positive_only

    def _rotate(self, x: torch.Tensor, role: str, block: Block, text: int, own: bool) -> torch.Tensor:
        seen, spans = self._now.record, {"text": (0, text), "image": (text, x.shape[2])}
        return self.protection.rotate(x, role, *block, **spans, seen=seen, own=own and not x.requires_grad)

    def _run(
        self,
        model: Any,
        acting: bool,
        record: Forward | None,
        chain: list[AttentionPatch],
        executor: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The forward's output. `_now` then holds the blocks that called the patch and the blocks that made queries."""
        now = self._now
        now.begin(acting, record, model.diffusion_model)
        try:
            with (
                protected_forward(model),
                watched_queries(now.network, self.protected, now.project),
                chained(chain),
                bridged(now.network, self, args, kwargs) as (args, kwargs),
            ):
                return executor(*args, **kwargs)
        finally:
            now.end()

    def _passed_by(self, run: _Run) -> bool:
        """Whether the last forward had attention without the patch. Skipped blocks count until a forward was whole."""
        return bool(self._now.unturned or (self.protected - self._now.called and not run.whole))

    def _complaint(self, model: Any, options: dict) -> str:
        missing = self.protected - self._now.called | self._now.unturned
        return (
            f"SafeRoPE was called in {len(self.protected - missing)} of the {len(self.protected)} blocks it protects "
            f"(not always in {min(missing)}), so this picture would not be protected. Expected: every block calls its "
            f"attention patches, in every pass. {suspects(model.current_patcher, options)}"
        )

    def _in_range(self, model_sampling: Any, sigma: torch.Tensor) -> bool:
        """Whether to act at these noise levels [B]. Where rows differ, one row in the range is enough."""
        if (self.start, self.end) == (0.0, 1.0):
            return True
        if self.start == self.end:
            return False
        first = math.inf if self.start <= 0 else float(model_sampling.percent_to_sigma(self.start))
        last = -math.inf if self.end >= 1 else float(model_sampling.percent_to_sigma(self.end))
        return any(first >= level > last for level in sigma.flatten().tolist())


class _Run:
    """The evidence of one sampling run."""

    def __init__(self, record: Run | None = None, pictures: int = 0) -> None:
        self.record, self.pictures = record, pictures
        self.passes: list[Pass] = []
        self.options: list[dict] = []  # Options that may change a forward, each once.
        self.chain: list[AttentionPatch] = []  # SafeRoPE's patches in the last forward.
        self.acted = False  # A forward lay in the range of steps.
        self.whole = False  # A forward has gone through every protected block.
        self.compiled = False  # A graph may hide, or hid, how blocks make queries.

    def blank(self, model: Any, x: torch.Tensor, sigma: torch.Tensor, options: dict) -> Forward | None:
        """An empty record for a forward of this run; None where no record is kept. It has no entries where the rows
        cannot be assigned to prompts.
        """
        if self.record is None:
            return None
        known = len(x) == self.pictures * len(options["cond_or_uncond"])
        entries = zip(options["cond_or_uncond"], options["uuids"], strict=True) if known else ()
        return Forward(list(entries), sigma.max(), grid_of(model.diffusion_model, x))

    def meet(self, options: dict) -> None:
        """Notes other code on the way of a forward, and SafeRoPE's patches."""
        now = hooked(options)
        if now not in self.options:
            self.options.append(now)
        patches = options.get("patches", {}).get("attn1_patch", [])
        self.chain = [patch for patch in patches if isinstance(patch, AttentionPatch)]


def patched(model: Any, patch: AttentionPatch | ListeningPatch) -> Any:
    """A clone of the ModelPatcher `model` with the patch after its own patches. `model` itself is not changed."""
    clone = model.clone()
    clone.set_model_attn1_patch(patch)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, patch.around_forward)
    if isinstance(patch, AttentionPatch):
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, patch.around_sampling)
        if not patch.watching:
            guard(clone)
    return clone


def _transformer_options(args: tuple, kwargs: dict) -> dict:
    """From the arguments of apply_model after x and t: c_concat, c_crossattn, control, transformer_options."""
    return kwargs.get("transformer_options") or (args[3] if len(args) > 3 else {})


def _require_chunks(q: torch.Tensor, pictures: int, kinds: list[int]) -> None:
    """Raise RuntimeError unless q [B, H, L, D] has a row for every picture and conditioning, as `_in_chunks` parts
    them.
    """
    if q.shape[0] != pictures * len(kinds):
        raise RuntimeError(
            f"SafeRoPE Apply is set to conditionings = positive only, but the model was called with {q.shape[0]} rows "
            f"for {len(kinds)} prompts of {pictures} pictures: another node takes the prompts apart, and the positive "
            "one could go unprotected. Remove the node that wraps the model's function, or set conditionings to all."
        )


def _in_chunks(kinds: list[int], x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """`turned` in the chunks of positive prompts, `x` in the others; both [B, H, L, D]."""
    parts = zip(kinds, x.chunk(len(kinds)), turned.chunk(len(kinds)), strict=True)
    return torch.cat([after if kind == POSITIVE else before for kind, before, after in parts])
