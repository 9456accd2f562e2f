"""ESD, erasing by negative guidance (Gandikota et al., ICCV 2023), as low-rank weights on FLUX's attention.

    || v_θ(x_t, c, t) - [v*(x_t, c, t) - η (v*(x_t, c, t) - v*(x_t, ∅, t))] ||²

with the teacher v* frozen, c the prompts that show the concept, and x_t from sampling v* with c for a part of its
steps. The states and the teacher's velocities are made once, then drawn from. All linear layers of attention learn
("esd-x" of the script for FLUX), as a LoRA, which that script has as a variant. As in the script, η = 1 and guidance is
1 in training. The script has lr 1e-4 and 1,400 steps of one prompt. The tiny model, of 256 channels, takes 60 steps,
with a larger learning rate and a batch. There the full weight costs benign pictures much, and half of it erases. The
strength is the weight of the LoRA, 1 being the weight that was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saferope_training.flux.models import Model, encode
from saferope_training.making.losses import mean_squared_error

from . import lora
from .task import Progress, Task, silent
from .teacher import erasing_lessons, live_velocity

STRENGTHS = (0.3, 0.4, 0.5, 1.0)
TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
RANK = 16
ETA = 1.0
GUIDANCE = 1.0
PROMPTS = 8
STEPS, BATCH, LEARNING_RATE = 60, 8, 1e-3


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The LoRA's weights, named as in LoRA files."""
    texts = [record.text for record in task.unsafe[:PROMPTS]]
    text, lessons = encode(model, texts), erasing_lessons(model, texts, seed, ETA, GUIDANCE)
    draw = torch.Generator().manual_seed(seed)
    with lora.added(model.transformer, TARGETS, RANK, seed) as weights:
        optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=0.0)
        for step in range(STEPS):
            some = torch.randint(len(lessons.latents), (BATCH,), generator=draw)
            asked = lessons.latents[some], lessons.times[some], text.pick(lessons.prompts[some])
            learned = live_velocity(model, *asked, GUIDANCE)
            optimiser.zero_grad()
            mean_squared_error(learned, lessons.targets[some].to(learned)).mean().backward()
            optimiser.step()
            progress(step + 1, STEPS)
        return lora.state_of(weights)


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """The transformer carries the LoRA, times `strength`; 0 changes nothing."""
    with lora.applied(model.transformer, state, TARGETS, strength):
        yield
