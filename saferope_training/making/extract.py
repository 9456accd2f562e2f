"""Collects statistics of the heads' queries and keys along the trajectories that a diffusers model samples.

saferope_core/measure/statistics.py defines the statistics and says why. This file has the walk, its processes and the
disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from saferope_core import BENIGN, COLLECTED, ROLES, UNSAFE, Gathering, Geometry, Statistics, Vectors, schedule

from .. import processes
from ..flux.attach import listening, positioned
from ..flux.models import Model, Text, encode, release_encoders, seeded_noise, text_tokens, velocity
from ..flux.pipelines import asked
from ..prompts import PromptRecord, side
from ..stages import load_tensors, save_tensors

BATCH = 48  # prompts at once, at most
MET = "met"


def extract(
    model: Model,
    records: Sequence[PromptRecord],
    timesteps: Sequence[float],
    capacity: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    passes_of: int = 0,
) -> Statistics:
    """Statistics of every head at the given times. Processes share the prompts and return the same.

    The noise of a prompt depends on the seed and its place alone, so that both sides start from the same noises.
    passes_of: prompts that go through the transformer at once; 0: 48.
    """
    gathering = Gathering(model.geometry, capacity, model.device)
    chosen = {name: side(records, name) for name in (UNSAFE, BENIGN)}
    progress(0, len(records))
    if model.cache is not None:
        _embed(model, chosen)
    done = 0
    for name, own in chosen.items():
        for chunk in torch.arange(len(own)).split(BATCH):
            mine = chunk[processes.index() :: processes.count()]
            for part in mine.split(passes_of or BATCH):
                if len(part):
                    places = part.tolist()
                    _visit(model, name, [own[i] for i in places], places, timesteps, seed, gathering)
            done += len(chunk)
            progress(done, len(records))
    return gathering.statistics(processes.total, processes.gathered)


def _embed(model: Model, chosen: dict[str, list[PromptRecord]]) -> None:
    """Puts all embeddings into the cache, and frees the encoders' memory for the statistics."""
    for own in chosen.values():
        for chunk in torch.arange(len(own)).split(BATCH):
            mine = chunk[processes.index() :: processes.count()].tolist()
            if mine:
                encode(model, [own[i].text for i in mine])
    if model.source is not None:
        release_encoders(model)


def _visit(
    model: Model,
    name: str,
    records: Sequence[PromptRecord],
    places: Sequence[int],
    timesteps: Sequence[float],
    seed: int,
    gathering: Gathering,
) -> None:
    """Walks some prompts down their trajectories and gives the heads' vectors to `gathering`."""
    texts, seeds = [record.text for record in records], [seed + place for place in places]
    kinds = text_tokens(model, texts, [record.subject for record in records])
    visit = gathering.visit(name, kinds, len(model.image_ids), seeds)
    text = encode(model, texts)
    rope = positioned(*asked(model).turns(model, text))

    def at_time() -> Callable:
        visit.at_time()
        return lambda x, *where: visit.listen(x, rope(x, *where[-2:]), *where)

    walk(model, text, seeded_noise(model, seeds), timesteps, at_time)


@torch.no_grad()
def walk(
    model: Model, text: Text, start: Tensor, timesteps: Sequence[float], listener: Callable[[], Callable] | None = None
) -> dict[float, Tensor]:
    """Samples from pure noise by Euler's method down to the last of the times, listening at each of them.

    `listener` is called at each time and returns a function for `listening`. Returns latents [B, L, C] of each time.
    """
    times, visited = schedule(timesteps), {}
    x = start
    for t, following in zip(times, [*times[1:], None], strict=True):
        if t in timesteps:
            visited[t] = x
        if following is None and listener is None:
            break
        heard = None if listener is None or t not in timesteps else listener()
        with nullcontext() if heard is None else listening(model.transformer, heard):
            v = velocity(model, x, torch.full((len(x),), t), text)
        if following is not None:
            x = x + (following - t) * v
    return visited


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes safetensors: `<side>.<kind>.gram_<role>`, `<side>.<kind>.sample_<role>` and `met.gram_<role>`."""
    tensors = {f"{MET}.gram_{role}": gram for role, gram in statistics.met.items()}
    for (name, kind), vectors in statistics.vectors.items():
        for role in ROLES:
            tensors[f"{name}.{kind}.gram_{role}"] = vectors.gram[role]
            tensors[f"{name}.{kind}.sample_{role}"] = vectors.sample[role]
    save_tensors(path, tensors)


def load_statistics(path: Path, geometry: Geometry) -> Statistics:
    """Reads a file of `save_statistics`. ValueError where it is not of a model of this geometry."""
    blocks, width = geometry.blocks, geometry.head_dim
    heads = {role: geometry.heads_of(role) for role in ROLES}
    names = [f"{name}.{kind}" for name, kind in COLLECTED]
    shapes: dict[str, tuple[int | None, ...]] = {
        f"{name}.gram_{role}": (blocks, heads[role], width, width) for name in (MET, *names) for role in ROLES
    }
    shapes |= {f"{name}.sample_{role}": (blocks, None, heads[role], width) for name in names for role in ROLES}
    tensors = load_tensors(path, shapes)
    vectors = {
        (name, kind): Vectors(
            {role: tensors[f"{name}.{kind}.gram_{role}"] for role in ROLES},
            {role: tensors[f"{name}.{kind}.sample_{role}"] for role in ROLES},
        )
        for name, kind in COLLECTED
    }
    return Statistics(vectors, {role: tensors[f"{MET}.gram_{role}"] for role in ROLES})
