"""The cost of turning queries and keys beside a FLUX block with random weights, and how it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor, nn

from saferope_core import SINGLE, Concept, Forward, Geometry, Protection, Roles, Stream, skew

from .peak import peak_of
from .timing import Row, in_turns, ratio, spread

PASSING = 0.002  # share of random vectors above the gate: calibrated gates turn about this share of safe tokens
WORD = 8  # text tokens that lie in the unsafe subspace, as a concept's own words do
TRAINED = {"rank": 16, "reach": 8}  # text width of concepts that `saferope train` makes


@dataclass(frozen=True)
class Size:
    """A FLUX block and the concepts in it; FLUX.1-dev at 1024 x 1024 unless told otherwise."""

    resolution: int = 1024
    heads: int = 24
    critical: float = 1.0
    concepts: int = 1
    rank: int = 5
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    reach: int = 0
    text: int = 512
    head_dim: int = 128

    @property
    def image(self) -> int:
        """Image tokens: a token for 16 x 16 pixels."""
        return (self.resolution // 16) ** 2

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, 1, self.heads, self.head_dim)


@cache
def gate_of(head_dim: int, rank: int) -> float:
    """The gate that PASSING of random vectors pass: squares of D normal numbers, the first R of which are inside."""
    squares = torch.randn(50_000, head_dim, generator=torch.Generator().manual_seed(0)).square()
    return (squares[:, :rank].sum(-1) / squares.sum(-1)).quantile(1 - PASSING).item()


def concept_of(size: Size, number: int = 0, heads: Tensor | None = None, geometry: Geometry | None = None) -> Concept:
    """A random concept in the first `critical` of the heads of a single block, or in the heads given."""
    generator, width = torch.Generator().manual_seed(number), size.rank + size.reach
    count = max(1, round(size.critical * size.heads))
    heads = torch.tensor([(SINGLE, 0, head) for head in range(count)]) if heads is None else heads
    geometry = geometry or size.geometry
    shape = len(heads), size.head_dim, width
    bases = [torch.linalg.qr(torch.randn(shape, generator=generator)).Q for _ in "qk"]
    generators = [skew(torch.randn(len(heads), width, width, generator=generator)) for _ in range(2)]
    delta = torch.zeros(geometry.blocks, geometry.heads)
    gate = gate_of(size.head_dim, size.rank)
    text, image = Stream(generators[0], Roles(*bases), acts_on="qk"), Stream(generators[1])
    return Concept(f"c{number}", f"c{number}", "", geometry, heads, text, image, delta, gate, reach=size.reach)


def vectors(size: Size, concept: Concept) -> Tensor:
    """Random q [B, H, L, D], stored as diffusers and ComfyUI have them, with WORD text tokens of the concept."""
    generator = torch.Generator().manual_seed(1)
    shape = size.batch, size.text + size.image, size.heads, size.head_dim
    x = torch.randn(shape, generator=generator).to(size.dtype).transpose(1, 2)
    inside = concept.basis("q")[..., : size.rank]
    own = torch.randn(size.batch, len(inside), WORD, size.rank, generator=generator) @ inside.mT
    x[:, concept.heads[:, 2].long(), :WORD] = own.to(size.dtype)
    return x


def turning(size: Size, recorded: bool = False, own: bool = True) -> Callable[[], object]:
    """Turns q and k of a block once; in place, as ComfyUI's patch does where no other is before it, or not.

    Turned vectors stay in their subspace, so the next call finds the same tokens above the gate.
    """
    concepts = [concept_of(size, number) for number in range(size.concepts)]
    guard, x = Protection(concepts, size.geometry), vectors(size, concepts[0])
    side, spans = size.resolution // 16, ((0, size.text), (size.text, size.text + size.image))

    def turn() -> None:
        seen = Forward(["prompt"], 1.0, (side, side)) if recorded else None
        for role in "qk":
            guard.rotate(x, role, "single", 0, *spans, seen=seen, own=own)

    return turn


def papers_form(size: Size) -> Callable[[], object]:
    """The same work as the paper's code does it: a matrix exponential for every token of every head, at any risk."""
    concept = concept_of(size)
    x, heads = vectors(size, concept), concept.heads[:, 2].long()
    scale = torch.full((size.batch, len(heads), x.shape[2], 1, 1), 0.5)

    def turn() -> None:
        for role in "qk":
            basis, own = concept.basis(role), x[:, heads].float()
            inside = torch.einsum("bhld,hdr->bhlr", own, basis)
            matrices = torch.matrix_exp(scale * concept.generator("text")[:, None])
            moved = torch.einsum("bhlij,bhlj->bhli", matrices, inside) - inside
            (own + torch.einsum("bhlr,hdr->bhld", moved, basis)).to(x.dtype)

    return turn


def block_of(size: Size, device: str = "cpu") -> tuple[nn.Module, Callable[[], object]]:
    """A FLUX single block with random weights, and a function that runs it once."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock

    width = size.heads * size.head_dim
    with torch.device("meta"):
        block = FluxSingleTransformerBlock(width, size.heads, size.head_dim)
    block = block.to(size.dtype).to_empty(device=device).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    frequencies = FluxPosEmbed(10_000, [16, 56, 56])(torch.zeros(size.text + size.image, 3, device=device))
    shapes = ((size.batch, size.image, width), (size.batch, size.text, width), (size.batch, width))
    image, text, time = (torch.randn(shape).to(device, size.dtype) for shape in shapes)
    return block, partial(block, image, text, time, frequencies)


def beside_the_block(size: Size, repeats: int) -> Iterator[Row]:
    """The rows of one block: time of the rotation, as a share of the time of the block, both measured in turns.

    Not the difference of two blocks: a block's own time varies by more than the rotation takes.
    """
    block, run = block_of(size)
    quarter, three, trained = replace(size, critical=0.25), replace(size, concepts=3), replace(size, **TRAINED)
    forms = {
        "block": run,
        "all": turning(size),
        "quarter": turning(quarter),
        "three": turning(three),
        "trained": turning(trained),
        "recorded": turning(size, recorded=True),
        "copied": turning(size, own=False),
        "paper": papers_form(size),
    }
    if size.dtype == torch.float32:  # a block in bf16 takes minutes where the CPU only emulates it, turning does not
        forms["bf16"] = turning(replace(size, dtype=torch.bfloat16))
    with torch.inference_mode():
        taken = in_turns(forms, repeats)
        extra, whole = _peaks(block, run, size)
    tokens = f"{size.text} + {size.image} tokens, {_name(size.dtype)}"

    def share(name: str, what: str, target: float | None) -> Row:
        value, width = ratio(taken[name], taken["block"], plus=1.0)
        return Row(what, value, "x", target, spread=width)

    yield Row(f"one single block, {tokens}", 1e3 * median(taken["block"]), "ms", spread=1e3 * spread(taken["block"]))
    yield Row("turning q and k of it", 1e3 * median(taken["all"]), "ms", spread=1e3 * spread(taken["all"]))
    if "bf16" in taken:
        yield Row("the same in bfloat16", 1e3 * median(taken["bf16"]), "ms", spread=1e3 * spread(taken["bf16"]))
    yield share("all", "block with rotation / without, all heads critical", 1.005)
    yield share("quarter", "the same, a quarter of the heads critical", 1.002)
    yield share("copied", "the same, all heads, q and k copied, as other nodes hold them", None)
    yield share("trained", f"the same, all heads, rank {trained.rank} and reach {trained.reach}", None)
    value, width = ratio(taken["paper"], taken["all"])
    yield Row("the paper's form / ours", value, "x", 40, True, width, "every token gets its matrix exponential")
    value, width = ratio(taken["three"], taken["all"])
    yield Row("three concepts / one", value, "x", 2.5, spread=width)
    yield share("recorded", "block with rotation and recorder / without", 1.03)
    yield Row("extra peak memory / peak of the block alone", extra / whole, "x", 0.01, note=f"{extra / 2**20:.0f} MiB")


def _peaks(block: nn.Module, run: Callable[[], object], size: Size) -> tuple[int, int]:
    """(bytes that rotation adds to the peak, bytes of the peak without), the block's weights included."""
    concept = concept_of(size)
    guard = Protection([concept], size.geometry)
    spans = (0, size.text), (size.text, size.text + size.image)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    peak = {"plain": weights + peak_of(run)}

    def hook(_module: nn.Module, _args: tuple, out: Tensor, role: str) -> None:
        guard.rotate(out.transpose(1, 2), role, "single", 0, *spans, own=True)

    hooks = [getattr(block.attn, f"norm_{role}").register_forward_hook(partial(hook, role=role)) for role in "qk"]
    run()  # prepares the plans, which stay
    peak["protected"] = weights + peak_of(run)
    for hook in hooks:
        hook.remove()
    return max(0, peak["protected"] - peak["plain"]), peak["plain"]


def curves(size: Size, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds to turn q and k, against each size by itself."""
    axes = {
        "resolution": (512, 768, 1024, 1536),
        "critical": (0.04, 0.25, 0.5, 1.0),
        "concepts": (1, 2, 3, 4),
        "rank": (2, 5, 10, 16, 32),
        "batch": (1, 2, 4),
    }
    found = {}
    with torch.inference_mode():
        for axis, values in axes.items():
            small = replace(size, resolution=min(512, size.resolution)) if axis == "batch" else size
            forms = {str(value): turning(replace(small, **{axis: value})) for value in values}
            taken = in_turns(forms, repeats)
            found[axis] = [(value, 1e3 * median(taken[str(value)])) for value in values]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
