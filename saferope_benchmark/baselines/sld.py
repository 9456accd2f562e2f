"""SLD, safe latent diffusion (Schramowski et al., CVPR 2023): guidance away from the concept, three passes a step.

Per element and step, with the velocities v_p of the prompt, v_∅ of the empty one and v_s of the negative one:

    φ = min(1, s_S |v_p - v_s|)      μ = φ where v_p - v_s < λ, else 0
    γ = μ (v_s - v_∅) + s_m ν        ν <- β_m ν + (1 - β_m) γ        v = v_∅ + g (v_p - v_∅ - γ)

γ acts after a warm-up of δ of the steps; the momentum ν gathers from the first. The paper says all this of the
predicted noise. At a given x_t a flow's velocity is that noise times a positive number plus a term that all three
passes share. So the formulas hold as they stand, with λ and s_S in units of velocity. g = 1: FLUX.1-dev has its
guidance embedded, so v_p is guided already. The negative prompt is the concept's word, or in the tiny world a caption
of it (see `task_of`). Nothing is learned. The strength is s_S. Defaults: the paper's strongest configuration, "max"
(δ 0, s_S 5000, λ 1, s_m 0.5, β_m 0.7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saferope_training.flux.models import Model, Text, encode

from .passes import together
from .task import Progress, Task, silent

STRENGTHS = (0.1, 0.3, 1.0, 5000.0)  # s_S; from about 100 on φ is 1 nearly everywhere
WARM_UP = 0.0  # δ, share of the steps
THRESHOLD = 1.0  # λ
MOMENTUM_SCALE = 0.5  # s_m
MOMENTUM = 0.7  # β_m


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The embeddings of the empty prompt and of the negative one, in this order."""
    text = encode(model, ["", task.away])
    return {"states": text.states, "pooled": text.pooled}


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Sampling is guided away from the concept, with s_S = `strength`; 0 changes nothing and costs nothing."""
    if not state or strength == 0:
        yield
        return
    guide = SafetyGuidance(strength, round(WARM_UP * model.steps))
    with together(model.transformer, Text(state["states"], state["pooled"]), guide.combine):
        yield


class SafetyGuidance:
    """The formula, with the momentum of the sampling run under way; a time that does not fall begins a new one."""

    def __init__(self, scale: float, warm_up: int) -> None:
        self.scale, self.warm_up = scale, warm_up
        self.last, self.step, self.momentum = 0.0, 0, torch.zeros(())

    def combine(self, velocities: Tensor, t: Tensor) -> Tensor:
        """The guided velocity [B, L, C] from the velocities of prompt, empty prompt and concept [3, B, L, C]; t [B]."""
        prompt, empty, unsafe = velocities.float()
        if self.step == 0 or t[0].item() >= self.last or self.momentum.shape != prompt.shape:
            self.step, self.momentum = 0, torch.zeros_like(prompt)
        share = ((prompt - unsafe).abs() * self.scale).clamp(max=1.0)
        share = torch.where(prompt - unsafe < THRESHOLD, share, 0.0)
        away = share * (unsafe - empty) + MOMENTUM_SCALE * self.momentum
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * away
        guided = prompt - away if self.step >= self.warm_up else prompt
        self.last, self.step = t[0].item(), self.step + 1
        return guided.to(velocities.dtype)
