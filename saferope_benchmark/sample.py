"""Pictures from diffusers' own pipeline, with or without protection: the reference path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saferope_training.flux.attach import Visitor, attached
from saferope_training.flux.models import Model, Text, encode, seeded_noise
from saferope_training.flux.painting import decode_pictures, paint

_BATCH = 16


@torch.no_grad()
def sample(
    model: Model,
    texts: Sequence[str],
    seeds: Sequence[int],
    visit: Callable | None = None,
    steps: int | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    progress: Callable[[int], None] = lambda count: None,
    batch: int = _BATCH,
) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1] of n texts from n seeds.

    `visit`, such as `Protection.rotate`, is attached in the part `span` of the steps: (0, 1) is all of them, (0, 0.5)
    the first half. A picture depends on its text and seed alone; `progress` is told the size of each finished batch.
    """
    pictures = []
    for first in range(0, len(texts), batch):
        some = slice(first, first + batch)
        latents = _denoise(model, encode(model, texts[some]), list(seeds[some]), visit, steps or model.steps, span)
        pictures.append(decode_pictures(model, latents))
        progress(len(latents))
    return torch.cat(pictures)


def _denoise(
    model: Model, text: Text, seeds: list[int], visit: Visitor | None, steps: int, span: tuple[float, float]
) -> Tensor:
    active = active_steps(steps, span)
    with _Switched(model, visit, 0 in active) as switch:
        noise = seeded_noise(model, seeds)
        return paint(model, text, noise, steps, callback_on_step_end=switch.after_step(active))


def active_steps(steps: int, span: tuple[float, float]) -> set[int]:
    """Indices of the steps that lie in the span, by where they start."""
    return {step for step in range(steps) if span[0] <= step / steps < span[1]}


class _Switched:
    """`visit` attached while it is on; the pipeline's callback says before each step whether it is."""

    def __init__(self, model: Model, visit: Visitor | None, on: bool) -> None:
        self.visit, self.on = visit, on
        self.context = nullcontext() if visit is None else attached(model.transformer, self._visit)

    def _visit(self, x: Tensor, *where: Any) -> Tensor | None:
        return self.visit(x, *where) if self.visit is not None and self.on else x

    def after_step(self, active: set[int]) -> Callable:
        def callback(_pipe: Any, step: int, _t: Any, kwargs: dict) -> dict:
            self.on = step + 1 in active
            return kwargs

        return callback

    def __enter__(self) -> _Switched:
        self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
