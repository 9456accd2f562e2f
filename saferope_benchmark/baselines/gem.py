"""GEM (Grebe, Braun et al., ICML 2026, arXiv 2606.00140): a LoRA drawn to an anchor and pushed off the concept.

    relu( ||v_θ(x, c, t) - v*(x, anchor, t)|| - η ||v_θ(x, c, t) - v*(x, c, t)|| )

with the teacher v* frozen and x on the first 10 of 28 steps of the student itself, which samples with the prompts c
again every few steps. Where the student is nearer to the anchor's velocity than to the concept's, by the factor η = 1,
there is nothing left to learn. The norms are over a whole velocity, here divided by the root of its size; AdamW does
not mind. LoRA of rank 16 on the queries and keys of double blocks, lr 1e-3, guidance 3. The authors take 250 states,
here it is 60 batches. The anchor is the prompt with something else in the concept's place, or the task's where it has
none. The authors' anchor is the empty prompt unless told. The tiny model has two double blocks. There queries and keys
of single blocks learn as well, as for EraseAnything. The strength is the weight of the LoRA, 1 being the weight that
was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saferope_training.flux.models import Model, encode

from . import lora
from .erase_anything import FEW_DOUBLE_BLOCKS, without_adapter
from .task import Progress, Task, silent
from .teacher import frozen_velocity, live_velocity, trajectories

STRENGTHS = (0.15, 0.25, 0.5, 1.0)
TARGETS = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)"
TINY_TARGETS = TARGETS + r"|single_transformer_blocks\.\d+\.attn\.(to_q|to_k)"
RANK = 16
ETA = 1.0
GUIDANCE = 3.0
PROMPTS = 8
STEPS, BATCH, LEARNING_RATE = 60, 8, 1e-3
FRESH = 10  # steps on the same trajectories
EARLY = 10 / 28  # of the sampling steps


def targets_of(model: Model) -> str:
    """The layers that learn."""
    return TINY_TARGETS if model.geometry.double_blocks <= FEW_DOUBLE_BLOCKS else TARGETS


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The LoRA's weights, named as in LoRA files."""
    asked = task.unsafe[:PROMPTS]
    concept = encode(model, [record.text for record in asked])
    anchor = encode(model, [record.instead or task.anchor for record in asked])
    draw = torch.Generator().manual_seed(seed)
    with lora.added(model.transformer, targets_of(model), RANK, seed) as weights:
        optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=0.0)
        for step in range(STEPS):
            if step % FRESH == 0:
                seeds = [seed + step * PROMPTS + place for place in range(len(asked))]
                times, met, _ = trajectories(model, concept, seeds)
            at, which = (torch.randint(size, (BATCH,), generator=draw) for size in (early(times), len(asked)))
            state = model, met[at, which], times[at]
            with without_adapter(model):
                wanted, unwanted = (frozen_velocity(*state, side.pick(which), GUIDANCE) for side in (anchor, concept))
            optimiser.zero_grad()
            hinge(live_velocity(*state, concept.pick(which), GUIDANCE), wanted, unwanted).mean().backward()
            optimiser.step()
            progress(step + 1, STEPS)
        return lora.state_of(weights)


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """The transformer carries the LoRA, times `strength`; 0 changes nothing."""
    with lora.applied(model.transformer, state, targets_of(model), strength):
        yield


def early(times: Tensor) -> int:
    """How many of the sampling steps are learned at, one at least."""
    return max(1, round(EARLY * len(times)))


def hinge(learned: Tensor, wanted: Tensor, unwanted: Tensor) -> Tensor:
    """The loss [B] of velocities [B, L, C]."""
    near, far = (_distance(learned, other.to(learned)) for other in (wanted, unwanted))
    return (near - ETA * far).relu()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square [B]; a floor keeps the gradient of a distance of 0 finite."""
    return ((one - other).square().flatten(1).mean(1) + 1e-12).sqrt()
