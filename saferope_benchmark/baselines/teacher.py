"""Lessons of the frozen model: states of its own sampling runs, and the velocities that a student should have there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saferope_training.flux.models import Model, Text, encode, seeded_noise, velocity
from saferope_training.flux.painting import paint

_BATCH = 16


@dataclass(frozen=True)
class Lessons:
    """N states met while sampling: latents [N, L, C] at times [N] of prompts [N], and target velocities [N, L, C]."""

    latents: Tensor
    times: Tensor
    prompts: Tensor
    targets: Tensor


@torch.no_grad()
def trajectories(model: Model, text: Text, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Times [S], the latents [S, B, L, C] that the pipeline has at them, and its last latents [B, L, C]."""
    dtype, met = model.transformer.dtype, []
    start = seeded_noise(model, seeds).to(dtype)

    def note(_pipe: Any, _step: int, _t: Any, kwargs: dict) -> dict:
        met.append(kwargs["latents"].float().cpu())
        return kwargs

    paint(model, text, start, model.steps, callback_on_step_end=note)
    times = model.pipe.scheduler.sigmas[: model.steps].float().cpu()
    return times, torch.stack([start.float().cpu(), *met[:-1]]), met[-1]


def erasing_lessons(model: Model, texts: Sequence[str], seed: int, eta: float, guidance: float) -> Lessons:
    """ESD's: states of the prompts c, and targets v(x, c, t) - η (v(x, c, t) - v(x, ∅, t)) of the frozen model.

    States come from sampling at the model's own guidance; velocities are asked for at `guidance`.
    """
    text, empty = encode(model, texts), encode(model, [""])
    parts = []
    for chunk in torch.arange(len(texts)).split(_BATCH):
        times, met, _ = trajectories(model, text.pick(chunk), (seed + chunk).tolist())
        flat = met.flatten(0, 1), times.repeat_interleave(len(chunk)), chunk.repeat(len(times))
        parts.append(flat)
    latents, times, prompts = (torch.cat(part) for part in zip(*parts, strict=True))
    targets = []
    for some in torch.arange(len(latents)).split(_BATCH):
        nothing = empty.pick(torch.zeros(len(some), dtype=torch.long))
        asked = [
            frozen_velocity(model, latents[some], times[some], words, guidance)
            for words in (text.pick(prompts[some]), nothing)
        ]
        targets.append(erased(*asked, eta).cpu())
    return Lessons(latents, times, prompts, torch.cat(targets))


def erased(concept: Tensor, empty: Tensor, eta: float) -> Tensor:
    """ESD's target velocity from the frozen model's with the concept and without a prompt."""
    return concept - eta * (concept - empty)


@torch.no_grad()
def frozen_velocity(model: Model, x: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
    """The velocity without a graph."""
    return live_velocity(model, x, t, text, guidance)


def live_velocity(model: Model, x: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
    """The velocity [B, L, C], differentiable, at an embedded guidance; bf16 autocast on a GPU, fp32 on a CPU."""
    at = replace(model, guidance=guidance)
    return velocity(at, x.to(model.device), t, text, autocast=model.device.type != "cpu")
