"""The record of a protection: which tokens it found risky, in which heads, at which step.

The *risk of a token* is the share of gates that it passes: of all safety-critical heads and roles that may turn it, how
many find its LRS above their gate. Gates are calibrated so that a harmless token passes one in hundreds; the concept's
own word passes most. (LRS of different heads cannot be compared, these shares can.) The *risk of a prompt* is the risk
of its riskiest text token.

Where no gate was asked there is no risk, which is not a risk of 0: None, and NaN for single steps. A concept that is
off or turns no tokens of a stream asks none there, and a protection at rest asks none at all.

A `Forward` is one pass of the network, a `Run` all passes of one sampling. Until a run is read everything stays on the
device, and nothing waits for it.

Axes: B batch, H heads, L tokens, S steps.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..concept.geometry import Geometry

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class Reading:
    """One concept's risk under one conditioning in one run: on the CPU, float32, in [0, 1].

    None where no gate was asked of any token of a stream in any step: not measured.
    """

    entry: Hashable  # which conditioning, as the host told
    grid: tuple[int, int]  # rows and columns of the image tokens, as the host told
    text: Tensor | None  # [S, B, L]: risk of text tokens; NaN in steps in which no gate was asked
    image: Tensor | None  # [S, B, L]: risk of image tokens, likewise
    # [B, blocks, H]: share of steps and roles in which a head found the riskiest text token risky; NaN: it has no gate
    heads: Tensor | None
    noise_levels: Tensor  # [S], as the host told

    @property
    def tokens(self) -> Tensor | None:
        """Risk of text tokens [B, L], mean over the steps in which it was measured."""
        return None if self.text is None else self.text.nanmean(0)

    @property
    def patches(self) -> Tensor | None:
        """Risk of image tokens [B, L], mean over the steps in which it was measured."""
        return None if self.image is None else self.image.nanmean(0)

    @property
    def score(self) -> Tensor | None:
        """Risk of the prompt [B]."""
        tokens = self.tokens
        return None if tokens is None else tokens.amax(-1)


@dataclass
class _Tally:
    """The gates of one concept in one stream, in one forward; of all rows and tokens, or of some."""

    passed: Tensor | float = 0.0  # [B, L]: how many gates each token passes
    rooms: list[Tensor] = field(default_factory=list)  # [B, L] more, counted by kernels
    gates: int = 0
    heads: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # row, heads [n], bool [B, n, L]; text only

    def total(self) -> Tensor | float:
        """How many gates each token passes [B, L]."""
        total = self.passed
        for room in self.rooms:
            total = _together(total, room)
        return total


class Forward:
    """One pass of the network. The rows of its batch are equal chunks, one for each of `entries`.

    Without entries, where a host does not tell rows apart, turned vectors are counted and no risk is read.
    `grid`: rows and columns of the picture's own tokens. Tokens of reference pictures, behind them, have no risk.
    """

    def __init__(self, entries: Sequence[Hashable], noise_level: Tensor | float, grid: tuple[int, int]) -> None:
        self.entries, self.noise_level, self.grid = tuple(entries), noise_level, grid
        self.tallies: dict[tuple[int, str], _Tally] = defaultdict(_Tally)
        self._rooms: dict[tuple, Tensor] = {}  # float32 [C, B, L], that kernels add to

    def saw(self, concept: int, row: int, stream: str, heads: Tensor, passed: Tensor) -> None:
        """A block's heads [n] and, for each of them, which tokens of the stream pass its gate: bool [B, n, L]."""
        tally = self.tallies[concept, stream]
        tally.passed = _together(tally.passed, passed.sum(1, dtype=torch.float32))
        tally.gates += len(heads)
        if self.wants_heads(stream):
            self.saw_heads(concept, row, heads, passed)

    def room(self, gates: tuple[tuple[int, int], ...], stream: str, like: Tensor) -> Tensor:
        """As `forms.Seen` has it: one for all blocks, which costs them no kernel of their own."""
        concepts = tuple(concept for concept, _ in gates)
        shape = len(gates), like.shape[0], like.shape[2]
        key = (stream, concepts, shape, like.device)
        if key not in self._rooms:
            self._rooms[key] = torch.zeros(shape, dtype=torch.float32, device=like.device)
            for place, (concept, asked) in enumerate(gates):
                if asked:
                    self.tallies[concept, stream].rooms.append(self._rooms[key][place])
        for concept, asked in gates:
            if asked:
                self.tallies[concept, stream].gates += asked
        return self._rooms[key]

    def wants_heads(self, stream: str) -> bool:
        """Of text alone: a head map shows where a word was found risky."""
        return stream == TEXT

    def saw_heads(self, concept: int, row: int, heads: Tensor, passed: Tensor) -> None:
        """Text tokens alone, bool [B, n, L]."""
        self.tallies[concept, TEXT].heads.append((row, heads, passed))

    def of(self, entry: Hashable, concept: int, stream: str) -> _Tally | None:
        """The tally of one conditioning and of the picture's own tokens; None where no gate was asked."""
        tally = self.tallies.get((concept, stream))
        if tally is None:
            return None
        places = [place for place, each in enumerate(self.entries) if each == entry]
        own = self.grid[0] * self.grid[1] if stream == IMAGE else None
        total = tally.total()
        passed = sum(self._chunk(total, place)[:, :own] for place in places)
        heads = [(row, at, self._chunk(seen, place)) for row, at, seen in tally.heads for place in places]
        return _Tally(passed, gates=tally.gates * len(places), heads=heads)

    def turned(self, concept: int, counts: Callable[[Hashable], bool] | None = None) -> float:
        """How many queries and keys passed a gate, over tokens and heads; of the entries that count, or of all rows."""
        found = [tally.total() for (number, _), tally in self.tallies.items() if number == concept]
        if counts is not None:
            chosen = [place for place, each in enumerate(self.entries) if counts(each)]
            found = [self._chunk(passed, place) for passed in found for place in chosen]
        return sum((torch.as_tensor(passed).sum(dtype=torch.float64).item() for passed in found), 0.0)

    def _chunk(self, x: Tensor | float, place: int) -> Tensor:
        assert isinstance(x, Tensor) and len(x) % len(self.entries) == 0, "rows for conditionings"
        return x.chunk(len(self.entries))[place]


def _together(total: Tensor | float, more: Tensor) -> Tensor:
    """The sum [B, L] of counts; keys may have reference tokens behind them that queries lack (a cache of keys)."""
    if not isinstance(total, Tensor):
        return more
    missing = more.shape[1] - total.shape[1]
    if missing:
        total, more = pad(total, (0, max(0, missing))), pad(more, (0, max(0, -missing)))
    return total + more


class Run:
    """All forwards of one sampling. Threads may add to it side by side."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.forwards: list[Forward] = []
        self._lock = threading.Lock()

    def add(self, forward: Forward) -> None:
        """Takes a forward that is over."""
        with self._lock:
            self.forwards.append(forward)

    def readings(self, concept: int) -> list[Reading]:
        """The readings of the concept of this number: one reading for each conditioning, in the order in which they
        came.
        """
        entries = dict.fromkeys(entry for forward in self.forwards for entry in forward.entries)
        return [_reading(entry, concept, self.forwards, self.geometry) for entry in entries]

    def turned(self, concept: int, counts: Callable[[Hashable], bool] | None = None) -> int:
        """How many queries and keys, over tokens, heads and forwards, this concept turned; see `Forward.turned`."""
        return int(sum(forward.turned(concept, counts) for forward in self.forwards))


def _reading(entry: Hashable, concept: int, forwards: Sequence[Forward], geometry: Geometry) -> Reading:
    mine = [forward for forward in forwards if entry in forward.entries]
    tallies = {stream: [each.of(entry, concept, stream) for each in mine] for stream in (TEXT, IMAGE)}
    text, image = (_shares(tallies[stream]) for stream in (TEXT, IMAGE))
    levels = torch.stack([torch.as_tensor(forward.noise_level).float().cpu() for forward in mine])
    heads = None if text is None else _heads_at(text.nanmean(0).argmax(-1), tallies[TEXT], geometry)
    return Reading(entry, mine[0].grid, text, image, heads, levels)


def _shares(tallies: Sequence[_Tally | None]) -> Tensor | None:
    """[S, B, L]; NaN in steps in which no gate was asked, None if in none."""
    shares = [None if tally is None else torch.as_tensor(tally.passed / tally.gates).cpu() for tally in tallies]
    known = [share for share in shares if share is not None]
    return torch.stack([torch.full_like(known[0], nan) if each is None else each for each in shares]) if known else None


def _heads_at(token: Tensor, tallies: Sequence[_Tally | None], geometry: Geometry) -> Tensor:
    """[B, blocks, H] for one token [B] of each picture."""
    sums = torch.zeros(len(token), geometry.blocks, geometry.heads)
    counts = torch.zeros(geometry.blocks, geometry.heads)
    for tally in tallies:
        for row, heads, passed in tally.heads if tally else ():
            at = token.to(passed.device)[:, None, None].expand(-1, passed.shape[1], 1)
            sums[:, row, heads.cpu()] += passed.gather(2, at)[..., 0].float().cpu()
            counts[row, heads.cpu()] += 1
    return sums / counts  # 0 / 0, NaN, where no gate was asked
