"""The cost of turning on a GPU, counted without a GPU: kernels, bytes and products of a step, and their share.

A block's turn runs on tensors without memory (PyTorch's meta device, under FakeTensorMode). Every operator that is no
view is a kernel: it reads its inputs once and writes its outputs once. All blocks are alike, so one is counted and
multiplied. A kernel takes the longest of three times,

    max(LAUNCH, bytes / bandwidth, 2 products / rate),

one kernel after the other. A step of the model computes at its card's rate and waits for nothing. It takes

    2 (blocks (k L h² + 2 L² h)) / rate,   h width, L tokens, k h² weights of a block for each stream.

Text keys turn in all blocks, image queries and keys in single blocks, as in the paper. Nothing here is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from saferope_core import Forward, Protection
from saferope_core.concept.files import write_text
from saferope_core.run.forms import PACKED, Form, Told, turn_exact, turn_packed
from saferope_core.run.fused import constants
from saferope_core.run.packed import packed

from . import compiled, rounding
from .held import Holding
from .rotation import TRAINED, Size, concept_of

LAUNCH = 5e-6  # seconds that a kernel takes at least: PyTorch needs them to send it
FORMS: tuple[Form, ...] = ("dense", "plain", "fused")
OUTPUTS = ("out", "grad_input")  # arguments that are written, not read
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty")


@dataclass(frozen=True)
class Model:
    """A FLUX at 1024 x 1024 pixels, bf16, one picture."""

    double_blocks: int
    single_blocks: int
    heads: int
    weights: int  # of a block for each stream, in squares of the width
    text: int = 512
    image: int = 4096
    head_dim: int = 128

    @property
    def products(self) -> float:
        """Multiply-adds of a step: linear layers and attention of all blocks."""
        width, tokens = self.heads * self.head_dim, self.text + self.image
        blocks = self.double_blocks + self.single_blocks
        return blocks * (self.weights * tokens * width**2 + 2 * tokens**2 * width)


# Blocks and heads from the models' configurations. Weights: q, k, v, out are 4; a GELU of ratio 4 is 8, a SwiGLU of
# ratio 3 is 9.
MODELS = {
    "FLUX.1": Model(19, 38, 24, 12),
    "FLUX.2 dev": Model(8, 48, 48, 13),
    "FLUX.2 klein 4B": Model(5, 20, 24, 13),
}


@dataclass(frozen=True)
class Card:
    """The speed of a class of cards: bytes a second, and operations a second in bf16."""

    bandwidth: float
    rate: float


CARDS = {"H100 class": Card(3e12, 700e12), "4090 class": Card(1e12, 165e12)}


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, the bytes that it reads and writes, and its multiply-adds."""

    name: str
    bytes: int
    products: int = 0

    def seconds(self, card: Card) -> float:
        return max(LAUNCH, self.bytes / card.bandwidth, 2 * self.products / card.rate)


@dataclass(frozen=True)
class Count:
    """The kernels of one call for text tokens and of one for image tokens, and how often a step makes each call. Also
    the bytes of all prepared plans, and the most bytes that a call makes at one time."""

    text: list[Kernel]
    image: list[Kernel]
    text_calls: int
    image_calls: int
    planes: int
    most: int

    def total(self, of: Any) -> float:
        """The sum of `of(kernel)` over all kernels of a step."""
        return self.text_calls * sum(map(of, self.text)) + self.image_calls * sum(map(of, self.image))

    def share(self, card: Card, model: Model) -> float:
        """The share of the time of a step."""
        return self.total(lambda each: each.seconds(card)) / (2 * model.products / card.rate)


class Counting(TorchDispatchMode):
    """Notes the kernel of every operator that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        home, name = func._schema.name.split("::")
        returned = [each.alias_info for each in func._schema.returns]
        view = any(each is not None and not each.is_write for each in returned)
        if not view and home != "prim" and name not in NO_KERNEL:
            self.kernels.append(_kernel(name, args, kwargs, out))
        return out


def _kernel(name: str, args: tuple, kwargs: dict, out: Any) -> Kernel:
    if name == "turn":
        return _fused_kernel(*args, **kwargs)
    written = sum(map(_bytes, _tensors(out)))
    if name == "index_select":  # of the heads that it copies alone
        return Kernel(name, 2 * written)
    if name == "index_copy_":
        return Kernel(name, 2 * _bytes(args[3]))
    products = 0
    if name in ("bmm", "baddbmm", "baddbmm_"):
        left, right = args[-2:] if name == "bmm" and len(args) == 2 else args[:2] if name == "bmm" else args[1:3]
        products = left.numel() * right.shape[-1]
    read = {name: value for name, value in kwargs.items() if name not in OUTPUTS}
    return Kernel(name, written + sum(map(_bytes, _tensors((args, read)))), products)


def _fused_kernel(
    span: Tensor,
    heads: Tensor,
    directions: Tensor,
    theta: Tensor,
    cut: Tensor,
    counts: Tensor | None,
    passed: Tensor | None,
) -> Kernel:
    """The fused kernel. It reads the vectors of the plan's heads and its directions. It writes one vector in hundreds,
    and as many counts, which are taken as none. Its products are counted as if every tile had a token that turns.
    """
    vectors = span.shape[0] * len(heads) * span.shape[2]
    concepts, planes = theta.shape[1:]
    sizes = constants(concepts, planes, directions)
    columns = concepts * (sizes["RANK_2"] + (6 if concepts > 1 else 4) * sizes["PLANES_2"])
    read = vectors * span.shape[-1] * span.element_size()
    rest = [each for each in (heads, directions, theta, cut, passed) if each is not None]
    return Kernel("turn", read + sum(map(_bytes, rest)), vectors * sizes["WIDTH_2"] * columns)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    """The bytes of the numbers that it has in memory: expanded numbers count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def count(form: Form, model: Model, size: Size, recorded: bool = False) -> Count:
    """A step of `model` with the concepts and the share of heads of `size`, by a form for GPUs."""
    size = replace(size, heads=model.heads, text=model.text, head_dim=model.head_dim)
    concepts = [concept_of(size, number) for number in range(size.concepts)]
    guard = Protection(concepts, size.geometry)
    plan: Any = guard._plans_for("dense", torch.empty(0))[1, "k", "text"]
    if form in PACKED:
        plan = packed(plan, model.heads, size.dtype, torch.device("cpu"))
    turn = turn_packed if form in PACKED else turn_exact
    text, image = (_kernels(turn, form, plan, model, size, stream, recorded) for stream in ("text", "image"))
    calls = model.double_blocks + model.single_blocks, 2 * model.single_blocks
    planes = sum(calls) * sum(map(_bytes, _tensors(plan)))
    return Count(text[0], image[0], *calls, planes, max(text[1], image[1]))


def _kernels(
    turn: Callable, form: Form, plan: Any, model: Model, size: Size, stream: str, recorded: bool
) -> tuple[list[Kernel], int]:
    """The kernels of one call, and the most bytes that it makes at one time."""
    tokens = model.text + model.image
    span = (0, model.text) if stream == "text" else (model.text, tokens)
    told = Told(Forward(["prompt"], 1.0, (64, 64)), 0, stream, 1)
    with FakeTensorMode():
        x = _without_memory(torch.empty(1, tokens, model.heads, model.head_dim, dtype=size.dtype)).transpose(1, 2)
        given = tree_map_only(Tensor, _without_memory, plan)
        for _ in range(2):  # a first call starts the sums that later ones add to
            with Counting() as seen, Holding() as held:
                turn(form, x, x, given, span, told if recorded else None, True)
    return seen.kernels, held.most


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """A row: a model, a form, and its work."""

    model: str
    form: Form
    critical: float = 1.0
    concepts: int = 1
    recorded: bool = False

    @property
    def name(self) -> str:
        heads = "" if self.critical == 1 else ", a third of the heads"
        many = "" if self.concepts == 1 else f", {self.concepts} concepts"
        return f"{self.model}, {self.form}{heads}{many}{', recorder' if self.recorded else ''}"


def cases() -> Iterator[Case]:
    """The cases of `saferope bench --count`."""
    for model in MODELS:
        for form in FORMS:
            yield Case(model, form)
            yield Case(model, form, concepts=3)
            if model == "FLUX.1":
                yield Case(model, form, critical=1 / 3)
                yield Case(model, form, recorded=True)


def row(case: Case) -> dict[str, Any]:
    """The figures of a case, at the widths of concepts that `saferope train` makes."""
    model = MODELS[case.model]
    size = Size(critical=case.critical, concepts=case.concepts, **TRAINED)
    counted = count(case.form, model, size, case.recorded)
    shares = {f"share, {name}": counted.share(card, model) for name, card in CARDS.items()}
    return {
        "case": case.name,
        "kernels a call": len(counted.image),
        "kernels a step": int(counted.total(lambda _: 1)),
        "GB a step": counted.total(lambda each: each.bytes) / 1e9,
        "10¹² products a step": counted.total(lambda each: each.products) / 1e12,
        **shares,
        "MB of prepared planes": counted.planes / 1e6,
        "MB more in a call": counted.most / 1e6,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, each.items())) + " |" for each in rows)]) + "\n"


def write(out: Path) -> str:
    """count.md and count.json in `out`; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [row(case) for case in cases()]
    write_text(out / "count.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    text = f"Counted, not timed.\n\n{table(rows)}\nRounding, against float64.\n\n{table(list(rounding.rows()))}"
    text += f"\nThe fused kernel, compiled ahead.\n\n{table(list(compiled.rows()))}"
    write_text(out / "count.md", text)
    return text


def _cell(item: tuple[str, Any]) -> str:
    name, value = item
    if name.startswith("share"):
        return f"{100 * value:.1f} %"
    return f"{value:{'.1e' if 0 < value < 1e-2 else '.2f'}}" if isinstance(value, float) else str(value)
