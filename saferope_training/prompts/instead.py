"""The same prompt with something else in the concept's place. Suppression aims at the picture of this prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from saferope_core import UNSAFE

if TYPE_CHECKING:
    from . import PromptRecord

# Words that need a noun after them. Where the subject was this noun, and another such word or nothing follows, they go.
_NEEDY = "a an the of in on with by as like and or from to for at under near behind showing depicting wearing".split()
_DANGLING = re.compile(rf"(?:(?:^|\s+)(?:{'|'.join(_NEEDY)}))+$", re.IGNORECASE)
_FIRST_WORD = re.compile(r"\w*")
_EMPTY_PART = re.compile(r",\s*(?=,|$)|^\s*,")
_ARTICLE = re.compile(r"\b(a)n? $", re.IGNORECASE)
_VOWELS = tuple("aeiouAEIOU")


def replaced(text: str, subject: tuple[int, int], word: str) -> str:
    """The text with `word` in place of the characters `subject` [start, end), the rest as it is.

    An article right before it changes to fit the word that follows now (a, an). An empty word takes the subject out,
    and with it dangling articles and prepositions, and empty parts between commas.
    """
    before, rest = text[: subject[0]], word + text[subject[1] :]
    if not word:
        before, rest = before.rstrip(), rest.lstrip()
        following = _FIRST_WORD.match(rest)
        if following is None or following[0].lower() in ("", *_NEEDY):
            before = _DANGLING.sub("", before)
        before += " "
    before = _ARTICLE.sub(r"\1n " if rest.startswith(_VOWELS) else r"\1 ", before)
    return before + rest if word else re.sub(r"\s+", " ", _EMPTY_PART.sub("", before + rest)).strip()


def with_instead(records: Sequence[PromptRecord], words: Iterable[str]) -> list[PromptRecord]:
    """The records, unsafe ones with `instead`: the next of the words stands in, or nothing where it is empty."""
    coming = iter(words)
    return [
        replace(record, instead=replaced(record.text, record.subject, next(coming)))
        if record.side == UNSAFE and record.subject is not None
        else record
        for record in records
    ]


def stand_ins(records: Iterable[PromptRecord]) -> list[str]:
    """The stand-ins for the concept, sorted, each once: the words of `instead` that differ from `text`.

    "" where the subject was taken out.
    """
    pairs = ((record.text, record.instead) for record in records)
    return sorted({_changed(text.split(), instead.split()) for text, instead in pairs if instead is not None})


def changed_span(text: str, instead: str) -> tuple[int, int]:
    """Characters [start, end) of the words of `text` between the common first and the common last words of both."""
    words = list(re.finditer(r"\S+", text))
    first, last = _ends([word[0] for word in words], instead.split())
    inner = words[first : len(words) - last]
    return (inner[0].start(), inner[-1].end()) if inner else (0, 0)


def _changed(text: list[str], instead: list[str]) -> str:
    """The words of `instead` between the common first and the common last words of both."""
    first, last = _ends(text, instead)
    return " ".join(instead[first : len(instead) - last])


def _ends(text: list[str], instead: list[str]) -> tuple[int, int]:
    """The number of common first words, and of common last words after these."""
    first = 0
    while first < min(len(text), len(instead)) and text[first] == instead[first]:
        first += 1
    last = 0
    while last < min(len(text), len(instead)) - first and text[-1 - last] == instead[-1 - last]:
        last += 1
    return first, last
