"""Collects what the heads make of the concept: queries and keys of text tokens, along real sampling trajectories.

A prompt's text tokens are of three kinds. Its *subject* is the concept's word. Its other *words* and the *padding* behind
them, which FLUX attends to like words, take the concept up from the subject within a few blocks, and what they hold then
depends little on the word that was used; so do the *image* tokens in which it is being painted. All vectors are taken after QK-norm and before RoPE. Kept are a Gram matrix per
head (exact, constant memory: its eigenvectors are the left singular vectors of the stacked vectors) and, where LRS are
to be read later, a bounded uniform sample. Besides, of all tokens, what text meets in attention: RoPE'd queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from saferope_core import Geometry, GramSum

from . import processes
from .attach import ROLES, listening, positioned
from .models import IMAGE, PADDING, SUBJECT, WORDS, Model, Text, encode, seeded_noise, text_tokens, velocity
from .prompts import BENIGN, UNSAFE, PromptRecord, side
from .stages import save_tensors

EULER_STEP = 0.1  # at most this far between two times of a trajectory: about the model's own step at high noise
_BATCH = 48
SAMPLED = ((UNSAFE, SUBJECT), (BENIGN, WORDS), (BENIGN, PADDING), (BENIGN, IMAGE))  # Δ and gates are read from these
COLLECTED = (*SAMPLED, (UNSAFE, WORDS), (UNSAFE, PADDING), (UNSAFE, IMAGE))
_IMAGE_TOKENS = 64  # of a prompt's image tokens at most this many are looked at, evenly spread
MET = "met"


@dataclass(frozen=True)
class Vectors:
    """One kind's vectors per role: Gram matrices [blocks, H, D, D] in float64 and a sample [blocks, n, H, D] in bf16.

    The sample is empty (n = 0) for kinds that nothing is read from.
    """

    gram: dict[str, Tensor]
    sample: dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """Vectors by (side, kind), and `met`: role -> Gram matrix [blocks, H, D, D] of what that role's vectors meet.

    Keys of text meet the queries of every token, RoPE applied, and queries meet keys.
    """

    vectors: dict[tuple[str, str], Vectors]
    met: dict[str, Tensor]


class Reservoir:
    """A uniform sample of at most `capacity` items of a stream, the same for the same items and keys in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: Tensor | None = None
        self.keys = torch.empty(0)

    def add(self, x: Tensor, keys: Tensor) -> None:
        """Offers the items x [n, ...] with random keys [n]; the smallest keys stay."""
        self.keys = torch.cat([self.keys, keys])
        self.items = x.clone() if self.items is None else torch.cat([self.items, x])
        if len(self.keys) > self.capacity:
            kept = self.keys.argsort()[: self.capacity].sort().values
            self.keys, self.items = self.keys[kept], self.items[kept]


class Collector:
    """Grams and samples of every block and role for one kind of token, fed block by block."""

    def __init__(self, geometry: Geometry, capacity: int, device: torch.device | str = "cpu") -> None:
        self.geometry, self.capacity = geometry, capacity
        places = [(role, row) for role in ROLES for row in range(geometry.blocks)]
        self.grams = {place: GramSum(geometry.heads, geometry.head_dim, device) for place in places}
        self.samples = {place: Reservoir(capacity) for place in places}

    def add(self, role: str, row: int, vectors: Tensor, keys: Tensor) -> None:
        """Takes vectors [n, H, D] of one block; `keys` [n], the same in every block, decide who stays in the sample."""
        self.grams[role, row].add(vectors)
        if self.capacity:
            self.samples[role, row].add(vectors.to("cpu", torch.bfloat16), keys)

    def vectors(self) -> Vectors:
        """What was collected in all processes, blocks stacked."""
        rows = range(self.geometry.blocks)
        empty = torch.empty(0, self.geometry.heads, self.geometry.head_dim, dtype=torch.bfloat16)
        gram = {
            role: torch.stack([processes.total(self.grams[role, row].gram.cpu()) for row in rows]) for role in ROLES
        }
        sample = {role: torch.stack([self._sample(role, row, empty) for row in rows]) for role in ROLES}
        return Vectors(gram, sample)

    def _sample(self, role: str, row: int, empty: Tensor) -> Tensor:
        own = self.samples[role, row]
        parts = processes.gathered((own.items if own.items is not None else empty, own.keys))
        everything = Reservoir(self.capacity)
        everything.add(torch.cat([items for items, _ in parts]), torch.cat([keys for _, keys in parts]))
        # in the order of the keys, so that it does not matter who saw what
        return everything.items[everything.keys.argsort()] if self.capacity else empty


def extract(
    model: Model,
    records: Sequence[PromptRecord],
    timesteps: Sequence[float],
    capacity: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics of every head at the given times. Processes share the prompts and return the same.

    The noise of a prompt depends on the seed and its place alone, so that both sides start from the same noises.
    """
    geometry, device = model.geometry, model.device
    collectors = {each: Collector(geometry, capacity if each in SAMPLED else 0, device) for each in COLLECTED}
    met = {(role, row): GramSum(geometry.heads, geometry.head_dim, device) for role in ROLES for row in _rows(model)}
    done = 0
    for name in (UNSAFE, BENIGN):
        chosen = side(records, name)
        for chunk in torch.arange(len(chosen)).split(_BATCH):
            mine = chunk[processes.index() :: processes.count()].tolist()
            if mine:
                _visit(model, name, [chosen[i] for i in mine], mine, timesteps, seed, collectors, met)
            done += len(chunk)
            progress(done, len(records))
    grams = {role: torch.stack([processes.total(met[role, row].gram.cpu()) for row in _rows(model)]) for role in ROLES}
    return Statistics({each: collector.vectors() for each, collector in collectors.items()}, grams)


def _visit(model, name, records, places, timesteps, seed, collectors, met) -> None:
    """Walks some prompts down their trajectories and hands what the heads see to the collectors."""
    texts = [record.text for record in records]
    kinds = text_tokens(model, texts, [record.subject for record in records])
    # random, but the same for a token whoever sees it
    generators = [torch.Generator().manual_seed(seed + place) for place in places]
    rope = positioned(model.transformer, model.image_ids)
    spread = slice(None, None, max(1, len(model.image_ids) // _IMAGE_TOKENS))
    seen = len(model.image_ids[spread])

    def listen(x, role, block_type, block_index, text, image) -> None:
        row = model.geometry.row(block_type, block_index)
        if text[0] < text[1]:
            tokens = x[:, :, text[0] : text[1]].transpose(1, 2)
            for kind, mask in kinds.items():
                if (name, kind) in collectors and mask.any():
                    collectors[name, kind].add(role, row, tokens[mask.to(x.device)], keys[:, seen:][mask])
        if image[0] < image[1]:
            tokens = x[:, :, image[0] : image[1]][:, :, spread].transpose(1, 2).flatten(0, 1)
            collectors[name, IMAGE].add(role, row, tokens, keys[:, :seen].flatten())
        turned, other = rope(x, text, image), ROLES[1 - ROLES.index(role)]
        for first, last, step in ((*text, 1), (*image, spread.step)):
            met[other, row].add(turned[:, :, first:last:step].transpose(1, 2).flatten(0, 1))

    def at_time() -> Callable:
        nonlocal keys
        keys = torch.stack([torch.rand(seen + model.text_length, generator=generator) for generator in generators])
        return listen

    keys = torch.empty(0)
    walk(model, encode(model, texts), seeded_noise(model, [seed + place for place in places]), timesteps, at_time)


def _rows(model: Model) -> range:
    return range(model.geometry.blocks)


@torch.no_grad()
def walk(
    model: Model, text: Text, start: Tensor, timesteps: Sequence[float], listener: Callable[[], Callable] | None = None
) -> dict[float, Tensor]:
    """Samples from pure noise by Euler's method down to the last of the times, listening at each of them.

    `listener` is called at each time and returns what `listening` takes. Returns the latents [B, L, C] met at each time.
    """
    times, visited = schedule(timesteps), {}
    x = start
    for t, following in zip(times, [*times[1:], None], strict=True):
        if t in timesteps:
            visited[t] = x
        if following is None and listener is None:
            break
        heard = listener is not None and t in timesteps
        with listening(model.transformer, listener()) if heard else nullcontext():
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


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes safetensors: `<side>.<kind>.gram_<role>`, `<side>.<kind>.sample_<role>` and `met.gram_<role>`."""
    tensors = {f"{MET}.gram_{role}": gram for role, gram in statistics.met.items()}
    for (name, kind), vectors in statistics.vectors.items():
        for role in ROLES:
            tensors[f"{name}.{kind}.gram_{role}"] = vectors.gram[role]
            tensors[f"{name}.{kind}.sample_{role}"] = vectors.sample[role]
    save_tensors(path, tensors)


def load_statistics(path: Path) -> Statistics:
    """Reads what `save_statistics` wrote."""
    tensors = load_file(path)
    vectors = {
        (name, kind): Vectors(
            {role: tensors[f"{name}.{kind}.gram_{role}"] for role in ROLES},
            {role: tensors[f"{name}.{kind}.sample_{role}"] for role in ROLES},
        )
        for name, kind in COLLECTED
    }
    return Statistics(vectors, {role: tensors[f"{MET}.gram_{role}"] for role in ROLES})
