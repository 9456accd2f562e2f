"""Checks of a concept before a model runs, so that no hour of work ends in an error.

A text encoder's vocabulary has no token for some words (T5 knows English, German, French and Romanian): they become one
and the same token. A concept made of that token is about all of them, and about none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .heads import Ranks
from .statistics import BENIGN, PADDING, SUBJECT, UNSAFE, WORDS, Span

_LACKING = {
    PADDING: "got none that leaves padding behind it, expected one at least that is shorter than the text encoder "
    "takes",
    WORDS: "got none with a word beside the concept's, expected one at least",
}
LONGEST_SHOWN = 60  # characters of a word in a message: scripts without spaces have long ones


def unknown_parts(ids: Sequence[int], offsets: Sequence[Span], unknown: int | None) -> list[Span]:
    """Characters [start, end) of a text that became the token `unknown`; None is a vocabulary without one.

    `ids` and `offsets` are the tokenizer's, token by token.
    """
    return [
        (span[0], span[1]) for token, span in zip(ids, offsets, strict=True) if token == unknown and span[0] < span[1]
    ]


def unknown_words(text: str, parts: Sequence[Span]) -> list[str]:
    """The words, from space to space, that the parts lie in, each once, in order."""
    words = [(found.start(), found.end(), found[0]) for found in re.finditer(r"\S+", text)]
    return list(dict.fromkeys(word for a, b, word in words if any(a < end and start < b for start, end in parts)))


def require_known(text: str, subject: Span, parts: Sequence[Span]) -> None:
    """Raises ValueError, naming it, where any of the concept's word, the characters `subject`, is among the parts."""
    shown = [text[max(a, subject[0]) : min(b, subject[1])] for a, b in parts if a < subject[1] and subject[0] < b]
    if shown:
        raise ValueError(
            f"prompt {text!r:.200}: the text encoder does not know {', '.join(map(repr, shown)):.80} of the concept's "
            f"word {text[slice(*subject)][:LONGEST_SHOWN]!r}, and a concept about it would be about everything that is "
            "not known; expected a word that it knows: FLUX's T5 knows English, German, French and Romanian, without "
            "emoji"
        )


def require_widths(ranks: Ranks, head_dim: int) -> None:
    """Raises ValueError where a head of so many dimensions has no room for subspaces of these ranks."""
    for name, width in (("text", ranks.risk + ranks.outside), ("image", ranks.image_risk + ranks.outside)):
        if width > head_dim:
            raise ValueError(
                f"ranks: got {width} dimensions for {name} tokens, expected at most a head's {head_dim}; lower them"
            )


def require_vectors(counts: dict[tuple[str, str], int], looks: int, ranks: Ranks, head_dim: int) -> None:
    """Raises ValueError where subspaces of these ranks cannot be read from so many tokens.

    `counts`: the tokens of all prompts by side and kind, as `token_kinds` parts them. `looks`: how often each is looked
    at.
    """
    require_widths(ranks, head_dim)
    for kind, rank in ((PADDING, ranks.padding), (WORDS, ranks.words)):
        for side in (UNSAFE, BENIGN):
            if rank and not counts[side, kind]:
                raise ValueError(f"{side} prompts: {_LACKING[kind]}; the concept is looked for there, too")
    if (seen := counts[UNSAFE, SUBJECT] * looks) < ranks.subject:
        raise ValueError(
            f"unsafe prompts: the concept's word would be seen {seen} times, expected at least {ranks.subject}, its "
            "rank; give more prompts, a dozen or more"
        )
