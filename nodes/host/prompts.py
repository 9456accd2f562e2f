"""The prompts that a concept is made from, as people write them into a node: with the concept's word in brackets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...saferope_core import UNSAFE, Ranks, require_known, require_vectors, token_kinds, unknown_words
from .chat import Chat
from .words import END, PADDING, chat_of, located, pieces, unknown

EXAMPLE = "such as `a red [star] on the beach`"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a side; `word` spans the characters of the concept's word in an unsafe one."""

    side: str
    text: str
    word: tuple[int, int] | None = None


def read_prompts(text: str, side: str) -> list[Prompt]:
    """One prompt a line; in unsafe ones the concept's word stands in brackets: `a red [star] on the beach`.

    Only a newline ends a line. Raises ValueError, naming the line, for an unsafe prompt without exactly one marked
    word, a safe one with any, and brackets that are empty, nested or do not pair.
    """
    prompts = []
    expected = f"Expected one, {EXAMPLE}" if side == UNSAFE else "Expected none: they show no concept"
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        try:
            plain, words = _without_brackets(line)
            if len(words) != (side == UNSAFE):
                raise ValueError(f"has {len(words)} words in brackets")
        except ValueError as error:
            raise ValueError(f"{side} prompts, line {number}: {line!r:.200} {error}. {expected}.") from None
        prompts.append(Prompt(side, plain, words[0] if words else None))
    if not prompts:
        raise ValueError(
            f"There are no {side} prompts. Expected a dozen or more, one a line. Write some, or choose a preset."
        )
    return prompts


def _without_brackets(line: str) -> tuple[str, list[tuple[int, int]]]:
    """The line without its brackets, and the characters [start, end) of it that they held, spaces around left out."""
    plain, start = "", None
    words: list[tuple[int, int]] = []
    for character in line:
        if character not in "[]":
            plain += character
        elif character == "[":
            if start is not None:
                raise ValueError("has a bracket within brackets")
            start = len(plain)
        elif start is None:
            raise ValueError("has a ] without its [")
        else:
            held = plain[start:]
            if not held.strip():
                raise ValueError("has brackets with nothing in them")
            words.append((start + len(held) - len(held.lstrip()), start + len(held.rstrip())))
            start = None
    if start is not None:
        raise ValueError("has a [ without its ]")
    return plain, words


def masks_in(clip: Any, prompt: Prompt, length: int) -> tuple[Tensor, Tensor]:
    """`masks_of`, bool [1, length], in a stream of so many tokens, of which an encoder may have cut some off."""
    chat = chat_of(clip, prompt.text)
    return masks_of(clip, prompt) if chat is None else _chat_masks(chat.placed(length), prompt)


def masks_of(clip: Any, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Which tokens of the text stream are the prompt's own, and which are the concept's word's: bool [1, L]. Nothing is
    encoded.

    Raises ValueError where the concept's word is not to be found in the stream, or the prompt longer than it.
    """
    if (chat := chat_of(clip, prompt.text)) is not None:
        return _chat_masks(chat, prompt)
    stream = pieces(clip, prompt.text)
    used = torch.tensor([[piece != PADDING for piece in stream]])
    subject = torch.zeros_like(used)
    if prompt.word:
        subject[0, slice(*located(clip, prompt.text, prompt.word))] = True
        if END not in stream:
            raise ValueError(
                f"Prompt {prompt.text!r:.200} is longer than the {len(stream)} tokens that the CLIP takes."
            )
    return used, subject


def _chat_masks(chat: Chat, prompt: Prompt) -> tuple[Tensor, Tensor]:
    used, subject = torch.zeros(2, 1, chat.length, dtype=torch.bool)
    used[0, [token for token, *_ in chat.own]] = True
    if prompt.word:
        subject[0, slice(*chat.subject(prompt.text, prompt.word))] = True
    return used, subject


def require_enough(clip: Any, prompts: list[Prompt], looks: int, ranks: Ranks, head_dim: int) -> list[str]:
    """Raises ValueError where a concept cannot be made of the prompts, each looked at `looks` times. Nothing is
    encoded.

    Returns the words beside the concept's that the CLIP does not know, each once.
    """
    counts: Counter[tuple[str, str]] = Counter()
    strange: list[str] = []
    for prompt in prompts:
        parts = unknown(clip, prompt.text)
        if prompt.word:
            require_known(prompt.text, prompt.word, parts)
        strange += unknown_words(prompt.text, parts)
        for kind, mask in token_kinds(*masks_of(clip, prompt)).items():
            counts[prompt.side, kind] += int(mask.sum())
    require_vectors(counts, looks, ranks, head_dim)
    return list(dict.fromkeys(strange))
