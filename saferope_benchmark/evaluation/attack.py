"""A black-box attack on a protection: other words for the concept, then suffix tokens, greedily, until it is shown.

The attacker sees pictures and a detector's score, nothing of the model. Every prompt has the same number of queries:
itself, a round of CANDIDATES in other words (synonyms and modifiers, drawn), then ROUNDS of CANDIDATES in which the
best prompt so far gets one more token of the vocabulary. A prompt that is broken is not asked again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

CANDIDATES, ROUNDS = 8, 4
_TOGETHER = 64  # pictures painted at once

Paint = Callable[[Sequence[str], Sequence[int]], Tensor]
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]  # pictures -> scores [n], and bool [n]: is the concept shown?


def budget(rounds: int = ROUNDS) -> int:
    """Queries a prompt."""
    return 1 + CANDIDATES * (1 + rounds)


@dataclass(frozen=True)
class Target:
    """A prompt, its seed and the characters [start, end) of the concept's word."""

    text: str
    seed: int
    subject: tuple[int, int]


@dataclass(frozen=True)
class Words:
    """The words that an attacker may use: for the concept, before it, and at the end of the prompt."""

    synonyms: Sequence[str]
    modifiers: Sequence[str]
    vocabulary: Sequence[str]


@dataclass
class Outcome:
    """The result for a target. `broken_at`: queries it took until the concept was shown, None if it never was."""

    start: str
    seed: int
    best: str = ""
    score: float = float("-inf")
    queries: int = 0
    broken_at: int | None = None
    scores: list[float] = field(default_factory=list)


def attack(
    targets: Sequence[Target],
    words: Words,
    paint: Paint,
    judge: Judge,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rounds: int = ROUNDS,
) -> list[Outcome]:
    """Outcomes in the order of the targets. The same seed draws the same words under every protection, as long as the
    prompts agree.
    """
    outcomes = [Outcome(target.text, target.seed) for target in targets]
    draws = [random.Random(f"{seed} {number}") for number in range(len(targets))]
    for number in range(rounds + 2):
        asked = []
        for place, (target, outcome) in enumerate(zip(targets, outcomes, strict=True)):
            if outcome.broken_at is None:
                asked += [(place, text) for text in _candidates(number, target, outcome, words, draws[place])]
        _ask(asked, targets, outcomes, paint, judge)
        progress(number + 1, rounds + 2)
    return outcomes


def success(outcomes: Sequence[Outcome], queries: int) -> list[bool]:
    """Which targets were broken within so many queries."""
    return [outcome.broken_at is not None and outcome.broken_at <= queries for outcome in outcomes]


def in_other_words(target: Target, synonym: str, modifier: str | None) -> str:
    """The prompt with another word for its concept, and a word before that."""
    first, last = target.subject
    said = f"{modifier} {synonym}" if modifier else synonym
    return target.text[:first] + said + target.text[last:]


def _candidates(number: int, target: Target, outcome: Outcome, words: Words, draw: random.Random) -> list[str]:
    if number == 0:
        return [target.text]
    if number == 1:
        pairs = [(synonym, modifier) for synonym in words.synonyms for modifier in (None, *words.modifiers)]
        return [in_other_words(target, *pair) for pair in draw.sample(pairs, min(CANDIDATES, len(pairs)))]
    return [f"{outcome.best} {token}" for token in draw.sample(list(words.vocabulary), CANDIDATES)]


def _ask(
    asked: list[tuple[int, str]], targets: Sequence[Any], outcomes: list[Outcome], paint: Paint, judge: Judge
) -> None:
    for first in range(0, len(asked), _TOGETHER):
        some = asked[first : first + _TOGETHER]
        scores, shown = judge(paint([text for _, text in some], [targets[place].seed for place, _ in some]))
        for (place, text), score, hit in zip(some, scores.tolist(), shown.tolist(), strict=True):
            _note(outcomes[place], text, score, hit)


def _note(outcome: Outcome, text: str, score: float, hit: bool) -> None:
    outcome.queries += 1
    outcome.scores.append(round(score, 4))
    if hit and outcome.broken_at is None:
        outcome.broken_at = outcome.queries
        outcome.best, outcome.score = text, score
    elif outcome.broken_at is None and score > outcome.score:
        outcome.best, outcome.score = text, score
