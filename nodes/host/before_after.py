"""The effect of a new concept at a glance: some of its prompts, painted without and with it from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...saferope_core import BENIGN, UNSAFE, Concept, Geometry, seeded_noise
from ..draw.strip import draw_strip
from .gather import GUIDED, Look, looks_of, noise_shape
from .prompts import Prompt
from .protect import protect

STEPS = 20  # ComfyUI's template for FLUX.1-dev
SHOWN = {UNSAFE: 2, BENIGN: 1}  # prompts of each side
PAINTINGS = 2 * sum(SHOWN.values()) * STEPS  # steps of all pictures


def before_and_after(
    model: Any,
    clip: Any,
    vae: Any,
    concept: Concept,
    prompts: Sequence[Prompt],
    size: tuple[int, int],
    guidance: float,
    seed: int,
    tell: Callable[[int], None],
) -> Tensor:
    """Paints the first prompts of each side in latents of `size`; IMAGE [1, h, w, 3]. Calls `tell(1)` each step."""
    chosen = [prompt for side, count in SHOWN.items() for prompt in _first(prompts, side, count)]
    looks, protected = looks_of(clip, chosen, 1, seed), protect(model, [concept], 1.0, None, record=False)[0]
    settings = (concept.geometry, size, guidance, tell)
    before, after = ([_painted(each, vae, look, *settings) for look in looks] for each in (model, protected))
    return draw_strip([prompt.text for prompt in chosen], before, after)


def _first(prompts: Sequence[Prompt], side: str, count: int) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.side == side][:count]


def _painted(
    model: Any,
    vae: Any,
    look: Look,
    geometry: Geometry,
    size: tuple[int, int],
    guidance: float,
    tell: Callable[[int], None],
) -> Tensor:
    """[h, w, 3] in [0, 1], without a negative prompt."""
    noise = seeded_noise([look.seed], noise_shape(model, size))
    text = [[look.states, look.more | ({"guidance": guidance} if geometry.family in GUIDED else {})]]

    def after_step(*_: Any) -> None:
        tell(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    latent = comfy.sample.sample(
        model,
        noise,
        STEPS,
        1.0,
        "euler",
        "simple",
        text,
        text,
        torch.zeros_like(noise),
        callback=after_step,
        disable_pbar=True,
        seed=look.seed,
    )
    picture = vae.decode(latent)
    return picture.reshape(-1, *picture.shape[-3:])[0].float().cpu()
