"""The time to turn queries and keys on a GPU, form by form, beside a FLUX block; all in turns, in one process.

The concepts have the widths that `saferope train` makes, as in `counting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from saferope_core import Forward, Protection
from saferope_core.concept.stream import STREAMS
from saferope_core.run.forms import PACKED, Form, Told, form_of, turn_exact, turn_packed

from .rotation import TRAINED, Size, block_of, concept_of, vectors
from .timing import Row, in_turns, ratio, spread

TARGET = 1.01  # a step with the fused form / without
CALLS = 20  # between two looks at the clock: a call takes about as long as a look
CASES = {
    "": {},
    ", 3 concepts": {"concepts": 3},
    ", a third of the heads": {"critical": 1 / 3},
    ", recorder": {"recorded": True},
}


def require_gpu() -> str:
    """The name of the GPU. Raises ValueError where PyTorch sees none."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device: got 'cuda', expected a GPU that PyTorch sees. This is PyTorch {torch.__version__}, and it sees "
            "none: install one for CUDA or ROCm (https://pytorch.org), or leave --device out to time the CPU"
        )
    return torch.cuda.get_device_name()


def rows(size: Size, repeats: int, device: str = "cuda", forms: Sequence[Form] = ()) -> Iterator[Row]:
    """The time of a block, of the turn by each form, and the share of both; forms: all that this device has."""
    size = replace(size, **TRAINED)
    forms = forms or tuple(dict.fromkeys((form_of(torch.empty(1, device=device, dtype=size.dtype)), "plain", "dense")))
    work: dict[str, Callable] = {"block": block_of(size, device)[1]}
    for form in forms:
        for name, changes in CASES.items():
            work[form + name] = turning(form, size, device, **changes)
    with torch.inference_mode():
        taken = in_turns({name: partial(_several, each) for name, each in work.items()}, repeats)
    for name, times in taken.items():
        each = [time / CALLS for time in times]
        yield Row(name, 1e3 * median(each), "ms", spread=1e3 * spread(each))
    for name in work:
        if name != "block":
            value, width = ratio(taken[name], taken["block"], plus=1.0)
            yield Row(
                f"block and {name} / block", value, "x", TARGET if name.startswith("fused") else None, spread=width
            )


def turning(
    form: Form, size: Size, device: str, concepts: int = 1, critical: float = 1.0, recorded: bool = False
) -> Callable[[], object]:
    """Turns q and k of a block, text and image tokens, in place and by one form."""
    size = replace(size, concepts=concepts, critical=critical)
    found = [concept_of(size, number) for number in range(concepts)]
    guard, x = Protection(found, size.geometry), vectors(size, found[0]).to(device)
    plans, side = guard._plans_for(form, x), size.resolution // 16
    spans = dict(zip(STREAMS, ((0, size.text), (size.text, size.text + size.image)), strict=True))

    def turn() -> None:
        seen = Forward(["prompt"], 1.0, (side, side))
        for role in "qk":
            for stream, span in spans.items():
                _turn(form, x, plans[1, role, stream], span, Told(seen, 1, stream, 1) if recorded else None)

    return turn


def _turn(form: Form, x: Tensor, plan: Any, span: tuple[int, int], told: Told | None) -> None:
    (turn_packed if form in PACKED else turn_exact)(form, x, x, plan, span, told, True)


def _several(run: Callable[[], object]) -> None:
    for _ in range(CALLS):
        run()
