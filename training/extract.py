"""Collects what the heads make of the concept: queries and keys of its tokens, along real sampling trajectories.

Unsafe side: the tokens of the concept's word. Safe side: every token of benign prompts. Both on the text stream, after
QK-norm and before RoPE. Kept are a Gram matrix per head (exact, constant memory: its eigenvectors are the left singular
vectors of the stacked vectors) and a bounded uniform sample, from which discrimination and gates are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferope_core import Geometry, GramSum

from .attach import ROLES, listening
from .models import Model, Text, encode, noise, token_mask, velocity
from .prompts import BENIGN, UNSAFE, PromptRecord, side

EULER_STEP = 0.1  # at most this far between two times of a trajectory: about the model's own step at high noise
_BATCH = 48


@dataclass(frozen=True)
class Vectors:
    """One side's vectors per role: Gram matrices [blocks, H, D, D] in float64 and a sample [blocks, n, H, D] in fp32."""

    gram: dict[str, Tensor]
    sample: dict[str, Tensor]


class Reservoir:
    """A uniform sample of at most `capacity` items of a stream, the same for the same seed and stream."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.items: Tensor | None = None
        self.keys = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Offers the items x [n, ...]: each draws a key, the smallest keys stay."""
        self.keys = torch.cat([self.keys, torch.rand(len(x), generator=self.generator)])
        self.items = x.clone() if self.items is None else torch.cat([self.items, x])
        if len(self.keys) > self.capacity:
            kept = self.keys.argsort()[: self.capacity].sort().values
            self.keys, self.items = self.keys[kept], self.items[kept]


class Collector:
    """Grams and samples of every block and role, fed block by block."""

    def __init__(self, geometry: Geometry, capacity: int, seed: int) -> None:
        self.geometry = geometry
        places = [(role, row) for role in ROLES for row in range(geometry.blocks)]
        self.grams = {place: GramSum(geometry.heads, geometry.head_dim) for place in places}
        # one seed for all: the sample holds the same tokens in every block and for q as for k
        self.samples = {place: Reservoir(capacity, seed) for place in places}

    def add(self, role: str, row: int, vectors: Tensor) -> None:
        """Takes vectors [n, H, D] of one block."""
        vectors = vectors.float().cpu()
        self.grams[role, row].add(vectors)
        self.samples[role, row].add(vectors)

    def vectors(self) -> Vectors:
        """What was collected, blocks stacked."""
        rows = range(self.geometry.blocks)
        return Vectors(
            {role: torch.stack([self.grams[role, row].gram for row in rows]) for role in ROLES},
            {role: torch.stack([self.samples[role, row].items for row in rows]) for role in ROLES},
        )


def extract(
    model: Model,
    records: Sequence[PromptRecord],
    timesteps: Sequence[float],
    capacity: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Vectors]:
    """Unsafe and benign vectors of every head at the given times, both sides from noise of the same seed."""
    result, done = {}, 0
    for name in (UNSAFE, BENIGN):
        chosen = side(records, name)
        collector = Collector(model.geometry, capacity, seed)
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, len(chosen), _BATCH):
            chunk = chosen[start : start + _BATCH]
            texts = [record.text for record in chunk]
            mask = token_mask(model, texts, [record.subject for record in chunk])
            walk(model, encode(model, texts), noise(model, len(chunk), generator), timesteps, _taking(collector, mask))
            done += len(chunk)
            progress(done, len(records))
        result[name] = collector.vectors()
    return result


@torch.no_grad()
def walk(
    model: Model, text: Text, start: Tensor, timesteps: Sequence[float], listen: Callable | None = None
) -> dict[float, Tensor]:
    """Samples from pure noise by Euler's method down to the last of the times, listening at each of them.

    Returns the latents [B, L, C] met at each of the times.
    """
    times, visited = schedule(timesteps), {}
    x = start
    for t, following in zip(times, [*times[1:], None], strict=True):
        if t in timesteps:
            visited[t] = x
        if following is None and listen is None:
            break
        with listening(model.transformer, listen) if listen and t in timesteps else nullcontext():
            v = velocity(model, x, torch.full((len(x),), t), text)
        if following is not None:
            x = x + (following - t) * v
    return visited


def schedule(timesteps: Sequence[float]) -> list[float]:
    """Falling times from 1 that meet every given one exactly, no two further apart than EULER_STEP."""
    times = [1.0]
    for stop in timesteps:
        gap = times[-1] - stop
        count = math.ceil(gap / EULER_STEP - 1e-9)
        times += [stop + gap * (count - i) / count for i in range(1, count + 1)]
    return times


def _taking(collector: Collector, mask: Tensor) -> Callable:
    """A listener that hands the marked text tokens (mask [B, L]) to the collector."""

    def listen(x, role, block_type, block_index, text, image) -> None:
        if text[0] == text[1]:
            return
        vectors = x[:, :, text[0] : text[1]].transpose(1, 2)[mask.to(x.device)]
        collector.add(role, collector.geometry.row(block_type, block_index), vectors)

    return listen


def save_statistics(path: Path, statistics: dict[str, Vectors]) -> None:
    """Writes both sides as safetensors: `<side>.gram_<role>` and `<side>.sample_<role>`."""
    tensors = {}
    for name, vectors in statistics.items():
        for role in ROLES:
            tensors[f"{name}.gram_{role}"] = vectors.gram[role]
            tensors[f"{name}.sample_{role}"] = vectors.sample[role]
    save_file(tensors, path)


def load_statistics(path: Path) -> dict[str, Vectors]:
    """Reads what `save_statistics` wrote."""
    tensors = load_file(path)
    return {
        name: Vectors(
            {role: tensors[f"{name}.gram_{role}"] for role in ROLES},
            {role: tensors[f"{name}.sample_{role}"] for role in ROLES},
        )
        for name in (UNSAFE, BENIGN)
    }
