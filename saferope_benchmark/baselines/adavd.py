"""Uni-AdaVD (Zhou et al., 2026, arXiv 2607.14521; AdaVD, CVPR 2025): the concept's component leaves every value.

For a token's value v, all heads together, and the concept's value c of that layer

    v' = v - δ (v·c / ||c||²) c        δ = strength · σ(100 (cos(v, c) - b))

v' is orthogonal to c as far as the shift δ lets it: δ is about 0 for tokens unlike the concept, and the strength for
tokens like it (5 in the authors' script for FLUX). Nothing is learned. Text and image tokens of every block lose the
component, at every step.

Two things are not as in the script. Here c is the mean value of the concept's words in the unsafe prompts, along the
base model's trajectories; the script runs the concept's name beside each prompt. Here b is the 99th percentile of
cos(v, c) in benign prompts; the script has a number for each layer and kind of concept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from saferope_core import SUBJECT
from saferope_training.flux.models import Model, Text, encode, text_tokens

from .task import Progress, Task, silent
from .teacher import frozen_velocity, trajectories

STRENGTHS = (0.5, 1.0, 2.0, 5.0)  # 1 takes the component out, 2 turns it round
STEEPNESS = 100.0
QUANTILE = 0.99
PROMPTS = 8


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """For every layer of values its `direction` [C], of unit length, and its `threshold` [1]."""
    unsafe, benign = task.unsafe[:PROMPTS], task.benign[:PROMPTS]
    texts, others = ([record.text for record in side] for side in (unsafe, benign))
    subject = text_tokens(model, texts, [record.subject for record in unsafe])[SUBJECT]
    seen, harmless = (_values(model, encode(model, side), seed) for side in (texts, others))
    state = {}
    for name in seen:
        source = name.replace("to_v", "add_v_proj") if name.startswith("transformer_blocks") else name
        met = seen[source]  # image tokens lose the component along the value of the text in their block
        marked = subject.repeat(len(met) // len(subject), 1)
        direction = normalize(met[:, : subject.shape[1]][marked].mean(0), dim=-1)
        state[f"{name}.direction"] = direction
        cosines = normalize(harmless[name], dim=-1).mul(direction).sum(-1).flatten()
        state[f"{name}.threshold"] = cosines.sort().values[int(QUANTILE * (len(cosines) - 1))][None].clone()
    return state


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Values without their component along the concept's; 0 changes nothing."""
    with ExitStack() as hooks:
        for name, layer in _layers(model).items() if state and strength != 0 else ():
            parts = (state[f"{name}.{part}"].to(model.device) for part in ("direction", "threshold"))
            hooks.callback(layer.register_forward_hook(_taking(*parts, strength)).remove)
        yield


def decomposed(values: Tensor, direction: Tensor, threshold: Tensor, strength: float) -> Tensor:
    """v' of values [..., C], a unit direction [C] and a threshold [1]."""
    component = (values * direction).sum(-1, keepdim=True)
    cosine = component / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    shift = strength * torch.sigmoid(STEEPNESS * (cosine - threshold))
    return values - shift * component * direction


def _taking(direction: Tensor, threshold: Tensor, strength: float) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def hook(_layer: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return decomposed(output.float(), direction, threshold, strength).to(output.dtype)

    return hook


def _layers(model: Model) -> dict[str, nn.Module]:
    """The layers that make values: of text and of image tokens in double blocks, of both in single ones."""
    ends = (".attn.to_v", ".attn.add_v_proj")
    return {name: module for name, module in model.transformer.named_modules() if name.endswith(ends)}


@torch.no_grad()
def _values(model: Model, text: Text, seed: int) -> dict[str, Tensor]:
    """Values [times B, L, C], fp32, of every layer at the first, the middle and the last time of sampling."""
    times, latents, _ = trajectories(model, text, [seed + place for place in range(len(text.states))])
    met: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name, layer in _layers(model).items():

            def note(_layer: nn.Module, _args: tuple, output: Tensor, name: str = name) -> None:
                met.setdefault(name, []).append(output.float().cpu())

            hooks.callback(layer.register_forward_hook(note).remove)
        for at in dict.fromkeys((0, len(times) // 2, len(times) - 1)):
            frozen_velocity(model, latents[at], times[at].expand(len(text.states)), text, model.guidance)
    return {name: torch.cat(parts) for name, parts in met.items()}
