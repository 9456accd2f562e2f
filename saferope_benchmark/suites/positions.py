"""The paper's figure 3: text tokens at random places in RoPE. The loss of a prompt tells how much of it lies in
positions.

FLUX puts every text token at (0, 0, 0), where RoPE turns nothing. Here each stands at a random row and column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from saferope_training.flux.models import Model

from ..evaluation.methods import Method

SPREADS = (1, 4, 16, 64)  # rows and columns are drawn from 0 .. spread; a FLUX picture of 1024 x 1024 has 64
DRAWS = (0, 1)  # seeds: how much of it is the luck of one draw


def random_positions(spreads: Sequence[int] = SPREADS, draws: Sequence[int] = DRAWS) -> list[Method]:
    """The model with its text tokens at random places, for every spread and draw; the strength is the spread."""
    return [_method(spread, draw) for draw in draws for spread in spreads]


def _method(spread: int, draw: int) -> Method:
    @contextmanager
    def context(model: Model) -> Iterator[None]:
        def move(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            ids = kwargs["txt_ids"]
            kwargs["txt_ids"] = ids + places(len(ids), spread, draw).to(ids)
            return args, kwargs

        handle = model.transformer.register_forward_pre_hook(move, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    name = f"random text positions, draw {draw + 1}"
    return Method(name, f"{name}, spread {spread}", context, strength=float(spread))


def places(length: int, spread: int, draw: int) -> torch.Tensor:
    """Ids [L, 3], whole numbers: 0, and a row and a column in 0 .. spread."""
    ids = torch.randint(spread + 1, (length, 3), generator=torch.Generator().manual_seed(draw))
    ids[:, 0] = 0
    return ids.float()
