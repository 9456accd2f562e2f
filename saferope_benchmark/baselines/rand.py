"""Rand, the ablation of SafeRoPE's paper: its heads, subspaces and gates, but generators drawn at random.

As `saferope calibrate --generator random` makes it, with all other settings at their defaults and the task's own
prompts. Nothing is learned but statistics. The strength is a factor on the generators, 1 being the paper's. The
generators are multiplied by it, since a protection's own strength ends at half a turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from saferope_core import (
    NAMES,
    STREAMS,
    Concept,
    Protection,
    critical_heads,
    stream_of,
    tensors_of,
)
from saferope_training.flux.attach import attached
from saferope_training.flux.models import Model
from saferope_training.making.extract import extract
from saferope_training.making.heads import table_of, untrained
from saferope_training.settings import Settings

from .task import Progress, Task, silent

STRENGTHS = (0.5, 1.0, 1.5, 2.0)


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The concept's tensors: heads, discrimination, bases, gates and random generators."""
    s = Settings(generator="random", seed=seed)
    statistics = extract(model, [*task.unsafe, *task.benign], s.timesteps, s.reservoir, seed, progress)
    table = table_of(statistics, s, model.geometry)
    found = critical_heads(table, model.geometry)
    fields = found.fields(untrained(found, s), s.acts_on, s.acts_on_image)
    tensors = {key: each for name in STREAMS for key, each in tensors_of(fields[name], NAMES[name]).items()}
    rest = {"heads": found.heads, "discrimination": table.discrimination, "reach": torch.tensor(found.reach)}
    return rest | {name: tensor for name, tensor in tensors.items() if tensor is not None}


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Queries and keys turn by the random generators, times `strength`; 0 changes nothing."""
    if not state or strength == 0:
        yield
        return
    s = Settings()
    acts_on = {"text": s.acts_on, "image": s.acts_on_image}
    streams = {name: stream_of(state, acts_on[name], NAMES[name]) for name in STREAMS}
    concept = Concept(
        slug="rand",
        name="Rand",
        description="random generators",
        geometry=model.geometry,
        heads=state["heads"],
        discrimination=state["discrimination"],
        threshold=s.threshold,
        mode="random",
        reach=int(state["reach"]),
        **{name: replace(each, generator=each.generator * strength) for name, each in streams.items()},
    )
    with attached(model.transformer, Protection([concept], model.geometry).rotate):
        yield
