"""Memory of a GPU that a stage holds while it runs, against the plan that was counted before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import processes
from ..console import say
from ..settings import CALIBRATE, EXTRACT, LATENTS, TRAIN
from ..stages import Progress
from .memory import EMBEDDING, GIB, LISTENING, TRAINING, WAYS_OUT, Plan

# Phases of the plan that a stage goes through
PHASES = {
    EXTRACT: (EMBEDDING, LISTENING),
    LATENTS: (EMBEDDING, LISTENING),
    TRAIN: (EMBEDDING, TRAINING),
    CALIBRATE: (EMBEDDING, TRAINING),
}


@dataclass
class Meter:
    """A stage's progress, passed on to `show`. Once a stage, from its first unit on, says where the GPU held more than
    planned.

    `peak()` gives the most bytes since it was called last.
    """

    plan: Plan
    peak: Callable[[], int]
    show: Progress
    _silent: dict[str, bool] = field(default_factory=dict)  # stages that have begun: whether their warning is out

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.show(stage, done, total)
        if self._silent.get(stage):
            return
        held, began = self.peak(), stage in self._silent
        told = above(self.plan, stage, held) if began else None
        self._silent[stage] = told is not None
        if told and processes.is_main():
            say(f"warning: {told}", err=True)


def above(plan: Plan, stage: str, held: int) -> str | None:
    """A warning where a stage held more bytes than its phases of the plan; None where it did not, or has none."""
    phases = plan.phases()
    expected = max((phases[name] for name in PHASES.get(stage, ()) if name in phases), default=held)
    if held <= expected:
        return None
    return (
        f"memory: {stage} got {held / GIB:.1f} GiB of the GPU, expected at most {expected / GIB:.1f} by the plan, so "
        f"it may run out. {WAYS_OUT}"
    )


def peak_of(device: str) -> Callable[[], int]:
    """The most bytes that PyTorch held on a GPU since the last call."""

    def peak() -> int:
        held = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return held

    return peak
