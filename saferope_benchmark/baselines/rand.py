"""Rand, the ablation of SafeRoPE's paper: its heads, subspaces and gates, but generators drawn at random.

As `saferope calibrate --generator random` makes it, with all other settings at their defaults and the task's own prompts.
Nothing is learned but statistics; the strength is a factor on the generators, 1 being the paper's. It is made part of them: a
protection's own strength ends at half a turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saferope_core import Concept, Protection, critical_heads, read_heads
from saferope_training.flux.attach import attached
from saferope_training.flux.models import Model
from saferope_training.making.calibrate import untrained
from saferope_training.making.extract import extract
from saferope_training.making.heads import ranks_of
from saferope_training.settings import Settings

from .task import Progress, Task, silent

STRENGTHS = (0.5, 1.0, 1.5, 2.0)
_BASES = ("basis_q", "basis_k", "gate_q", "gate_k", "basis_image_q", "basis_image_k", "gate_image_q", "gate_image_k")


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The concept's tensors: heads, discrimination, bases, gates and random generators."""
    s = Settings(generator="random", seed=seed)
    statistics = extract(model, [*task.unsafe, *task.benign], s.timesteps, s.reservoir, seed, progress)
    table = read_heads(statistics, ranks_of(s), s.basis, s.threshold, s.cut, s.gate, s.quantile)
    found = critical_heads(table, model.geometry)
    text, image = untrained(found, s)
    named = {f"basis_{name}": basis for name, basis in found.basis.items()}
    named |= {f"gate_{name}": gate for name, gate in found.gate.items()}
    return {
        "heads": found.heads,
        "discrimination": table.discrimination,
        "generator_text": text,
        "generator_image": image,
        "reach": torch.tensor(found.reach),
        **{name: named[name] for name in _BASES if name in named},
    }


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Queries and keys turn by the random generators, times `strength`; 0 changes nothing."""
    if not state or strength == 0:
        yield
        return
    s, parts = Settings(), {name: tensor for name, tensor in state.items() if name != "reach"}
    concept = Concept(
        slug="rand",
        name="Rand",
        description="random generators",
        geometry=model.geometry,
        threshold=s.threshold,
        acts_on=s.acts_on,
        acts_on_image=s.acts_on_image,
        mode="random",
        reach=int(state["reach"]),
        **{name: tensor * strength if name.startswith("generator_") else tensor for name, tensor in parts.items()},
    )
    with attached(model.transformer, Protection([concept], model.geometry).rotate):
        yield
