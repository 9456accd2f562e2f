"""The statistics of a concept in every head: Gram matrices and samples of queries and keys, by side and kind of token.

A prompt's text tokens are of three kinds: the *subject* (the concept's word), other *words*, and the *padding* behind
them. FLUX attends to padding like words. Words and padding take the concept up from the subject within a few blocks,
and so do the *image* tokens that paint it. Their content then depends little on the word that was used. All vectors are
taken after QK-norm and before RoPE. Each head keeps a Gram matrix: exact, in constant memory, and its eigenvectors are
the left singular vectors of the stacked vectors. Where LRS are to be read later, a bounded uniform sample is kept too.
Of all tokens, the RoPE'd queries and keys that text meets in attention are kept as a Gram matrix.

Axes: B prompts, L tokens, H heads, D head dimension, n vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..concept.geometry import Geometry
from ..concept.stream import ROLES
from ..maths.subspace import GramSum, SmallGramSum

UNSAFE, BENIGN = "unsafe", "benign"  # sides: prompts with the concept, and without
SUBJECT, WORDS, PADDING, IMAGE = "subject", "words", "padding", "image"  # kinds of tokens
SAMPLED = ((UNSAFE, SUBJECT), (BENIGN, WORDS), (BENIGN, PADDING), (BENIGN, IMAGE))  # Δ and gates are read from these
COLLECTED = (*SAMPLED, (UNSAFE, WORDS), (UNSAFE, PADDING), (UNSAFE, IMAGE))

EULER_STEP = 0.1  # at most this far between two times of a trajectory: about the model's own step at high noise
IMAGE_TOKENS = 64  # of a prompt's image tokens at most this many are looked at, evenly spread

Span = tuple[int, int]


class SmallGrams:
    """Gram matrices of all blocks, read block by block like a tensor [blocks, H, D, D]: each is made float64 then."""

    def __init__(self, sums: Sequence[SmallGramSum]) -> None:
        self._sums = sums

    def __len__(self) -> int:
        return len(self._sums)

    def __getitem__(self, row: int) -> Tensor:
        return self._sums[row].gram.cpu()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Vectors:
    """One kind's vectors per role: Gram matrices [blocks, H, D, D] in float64 and a sample [blocks, n, H, D] in bf16.

    H is the role's own number of heads. The sample is empty (n = 0) for kinds of token whose LRS are not read. `small`
    statistics have both block by block, and are read once.
    """

    gram: Mapping[str, Any]
    sample: Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """Vectors by (side, kind), and `met`: role -> Gram matrix [blocks, H, D, D] of the vectors that the role meets.

    Keys of text meet the queries of every token, RoPE applied, and queries meet keys.
    """

    vectors: dict[tuple[str, str], Vectors]
    met: Mapping[str, Any]


class Reservoir:
    """A uniform sample of at most `capacity` items of a stream, the same for the same items and keys in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: Tensor | None = None  # as many items as there are keys, and room for more
        self._keys, self._came = torch.empty(0), torch.empty(0, dtype=torch.long)  # of the items; when they came
        self._offered = 0

    @property
    def keys(self) -> Tensor:
        """The keys of the items that stayed, in the order in which they came."""
        return self._keys[self._came.argsort()]

    @property
    def items(self) -> Tensor | None:
        """The items that stayed, in the order in which they came; None where none was offered."""
        return None if self._held is None else self._held[self._came.argsort()]

    def add(self, x: Tensor, keys: Tensor) -> None:
        """Offers the items x [n, ...] with random keys [n]; the smallest keys stay. A full sample is written in place:
        items that stay are not copied. ValueError where there are not as many items as keys.
        """
        if len(x) != len(keys):
            raise ValueError(f"a sample of vectors: got {len(x)} items and {len(keys)} keys, expected as many of both")
        came = torch.arange(self._offered, self._offered + len(keys))
        self._offered += len(keys)
        room = self.capacity - len(self._keys)
        self._append(x[:room], keys[:room], came[:room])
        kept = torch.cat([self._keys, keys[room:]]).argsort()[: self.capacity]
        new = kept[kept >= self.capacity] - self.capacity + room
        if self._held is not None and len(new):
            gone = torch.ones(self.capacity, dtype=torch.bool)
            gone[kept[kept < self.capacity]] = False
            self._held[gone], self._keys[gone], self._came[gone] = x[new], keys[new], came[new]

    def _append(self, x: Tensor, keys: Tensor, came: Tensor) -> None:
        first, last = len(self._keys), len(self._keys) + len(keys)
        if self._held is None or last > len(self._held):
            larger = x.new_empty(min(self.capacity, max(last, 2 * first)), *x.shape[1:])
            if self._held is not None:
                larger[:first] = self._held[:first]
            self._held = larger
        self._held[first:last] = x
        self._keys, self._came = torch.cat([self._keys, keys]), torch.cat([self._came, came])


Sums = dict[tuple[str, int], GramSum] | dict[tuple[str, int], SmallGramSum]


def _sums(geometry: Geometry, device: torch.device | str, small: bool) -> Sums:
    """An empty sum for every role and block."""
    kind: Any = SmallGramSum if small else GramSum
    sizes = {role: (geometry.heads_of(role), geometry.head_dim, device) for role in ROLES}
    return {(role, row): kind(*sizes[role]) for role in ROLES for row in range(geometry.blocks)}


def _read(sums: Sums, rows: range, total: Callable[[Tensor], Tensor]) -> Mapping[str, Any]:
    """The Gram matrices of every role, the blocks together."""
    own: Any = sums
    if isinstance(own[ROLES[0], 0], SmallGramSum):
        return {role: SmallGrams([own[role, row] for row in rows]) for role in ROLES}
    return {role: torch.stack([total(own[role, row].gram.cpu()) for row in rows]) for role in ROLES}


class Collector:
    """Grams and samples of every block and role for one kind of token, fed block by block."""

    def __init__(
        self, geometry: Geometry, capacity: int, device: torch.device | str = "cpu", small: bool = False
    ) -> None:
        self.geometry, self.capacity, self.small = geometry, capacity, small
        places = [(role, row) for role in ROLES for row in range(geometry.blocks)]
        self.grams = _sums(geometry, device, small)
        self.samples = {place: Reservoir(capacity) for place in places}

    def add(self, role: str, row: int, vectors: Tensor, keys: Tensor) -> None:
        """Takes vectors [n, H, D] of one block. `keys` [n], the same in every block, decide which the sample holds."""
        self.grams[role, row].add(vectors)
        if self.capacity:
            self.samples[role, row].add(vectors.to("cpu", torch.bfloat16), keys)

    def vectors(self, total: Callable[[Tensor], Tensor], gathered: Callable) -> Vectors:
        """The statistics of all processes, blocks stacked. The samples are given away: they are gigabytes."""
        rows = range(self.geometry.blocks)
        sample: dict[str, Any] = {}
        for role in ROLES:
            blocks = [self._sample(role, row, gathered) for row in rows]
            sample[role] = blocks if self.small else torch.stack(blocks)
        return Vectors(_read(self.grams, rows, total), sample)

    def _sample(self, role: str, row: int, gathered: Callable) -> Tensor:
        empty = torch.empty(0, self.geometry.heads_of(role), self.geometry.head_dim, dtype=torch.bfloat16)
        own = self.samples.pop((role, row))
        parts = gathered((own.items if own.items is not None else empty, own.keys))
        everything = Reservoir(self.capacity)
        everything.add(torch.cat([items for items, _ in parts]), torch.cat([keys for _, keys in parts]))
        # in the order of the keys, so that the order of the processes does not matter
        kept = everything.items
        return empty if kept is None or not self.capacity else kept[everything.keys.argsort()]


class Gathering:
    """Collectors of everything that heads are read from, for one concept.

    `small`: Gram matrices in a quarter of the memory (`SmallGramSum`), for one process alone.
    """

    def __init__(
        self, geometry: Geometry, capacity: int, device: torch.device | str = "cpu", small: bool = False
    ) -> None:
        self.geometry = geometry
        sizes = {each: capacity if each in SAMPLED else 0 for each in COLLECTED}
        self.collectors = {each: Collector(geometry, size, device, small) for each, size in sizes.items()}
        self.met = _sums(geometry, device, small)

    def visit(self, side: str, kinds: dict[str, Tensor], image_tokens: int, seeds: Sequence[int]) -> Visit:
        """Some prompts of a side, to be walked down: `kinds` from `token_kinds`, a seed for each prompt."""
        return Visit(self, side, kinds, image_tokens, seeds)

    def statistics(
        self, total: Callable[[Tensor], Tensor] = lambda x: x, gathered: Callable = lambda value: [value]
    ) -> Statistics:
        """All that was seen, once: samples are given away. Where processes share the work, `total` sums over them and
        `gathered` lists their values."""
        grams = _read(self.met, range(self.geometry.blocks), total)
        vectors = {each: collector.vectors(total, gathered) for each, collector in self.collectors.items()}
        return Statistics(vectors, grams)


class Visit:
    """Some prompts on their way down a trajectory: call `at_time` before each forward that is listened to."""

    def __init__(
        self, gathering: Gathering, side: str, kinds: dict[str, Tensor], image_tokens: int, seeds: Sequence[int]
    ) -> None:
        self.gathering, self.side, self.kinds = gathering, side, kinds
        # random, but the same for a token in every process
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.spread = max(1, image_tokens // IMAGE_TOKENS)
        self.image_tokens, self.seen = image_tokens, len(range(0, image_tokens, self.spread))
        self.text_length = next(iter(kinds.values())).shape[1]
        self.keys = torch.empty(0)

    def at_time(self) -> None:
        """Draws the keys that decide which tokens stay in the samples."""
        length = self.seen + self.text_length
        self.keys = torch.stack([torch.rand(length, generator=generator) for generator in self.generators])

    def listen(
        self, x: Tensor, turned: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span
    ) -> None:
        """Takes one role's vectors [B, H, L, D] of a block, before RoPE and (`turned`) after it, and the streams'
        spans. A key head meets the queries of all heads that share it.
        """
        row, collectors = self.gathering.geometry.row(block_type, block_index), self.gathering.collectors
        if text[0] < text[1]:
            tokens = x[:, :, text[0] : text[1]].transpose(1, 2)
            for kind, mask in self.kinds.items():
                if (self.side, kind) in collectors and mask.any():
                    keys = self.keys[:, self.seen :][mask]
                    # a prompt's own length may be shorter than the length of all
                    own = mask[:, : tokens.shape[1]].to(x.device)
                    collectors[self.side, kind].add(role, row, tokens[:, : own.shape[1]][own], keys)
        if image[0] < image[1]:
            last = image[0] + self.image_tokens  # behind it a network may have padding of its own
            tokens = x[:, :, image[0] : last : self.spread].transpose(1, 2).flatten(0, 1)
            collectors[self.side, IMAGE].add(role, row, tokens, self.keys[:, : self.seen].flatten())
        other = ROLES[1 - ROLES.index(role)]
        for first, last, step in ((*text, 1), (*image, self.spread)):
            vectors = turned[:, :, first:last:step].transpose(1, 2).flatten(0, 1)
            self.gathering.met[other, row].add(_met_by(other, vectors, self.gathering.geometry.group))


def _met_by(role: str, vectors: Tensor, group: int) -> Tensor:
    """The vectors that each head of a role meets, [n', H of the role, D], from the other role's vectors [n, H, D]."""
    if group == 1:
        return vectors
    if role == "q":
        return vectors.repeat_interleave(group, dim=1)
    return vectors.unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)


def token_kinds(used: Tensor, subject: Tensor, attended: Tensor | None = None) -> dict[str, Tensor]:
    """Bool [B, L] for each kind of text token: `used` are a prompt's own tokens, `subject` the tokens of the concept's
    word.

    FLUX attends to padding as to words. As many padding tokens are marked as the prompt has other tokens: with all of
    them, 512 in FLUX's own pipeline, words would hardly count. The end of a chat template stands in the same place and
    counts as padding. `attended`: the tokens that attention sees, where it does not see all. Others are of no kind.
    """
    places, first = torch.arange(used.shape[1])[None], used.int().argmax(1, keepdim=True)  # a template may come before
    behind = (places > first) & ~used & (True if attended is None else attended)
    near = behind & (behind.cumsum(1) <= used.sum(1, keepdim=True))
    return {SUBJECT: subject, WORDS: used & ~subject, PADDING: near}


def schedule(timesteps: Sequence[float]) -> list[float]:
    """Falling times from 1 that meet every given one exactly, no two further apart than EULER_STEP."""
    times = [1.0]
    for stop in timesteps:
        gap = times[-1] - stop
        count = math.ceil(gap / EULER_STEP - 1e-9)
        times += [stop + gap * (count - i) / count for i in range(1, count + 1)]
    return times
