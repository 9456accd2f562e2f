"""Finds the concept's word in a prompt, in scripts with spaces between words and in scripts without."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

# Scripts without spaces between words, or with endings that are written on to words: there a word has no boundary.
# Blocks of the Unicode standard: Thai and Lao, Tibetan, Myanmar, Hangul Jamo, Khmer; CJK from its radicals to the
# syllables of Yi, Hangul; compatibility ideographs; halfwidth kana and Hangul; the ideographic planes.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x0F00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1100, 0x11FF),
    (0x1780, 0x17FF),
    (0x2E80, 0xA4CF),
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFFDC),
    (0x20000, 0x3FFFF),
)
_FORMS: tuple[Literal["NFC", "NFD"], ...] = (
    "NFC",
    "NFD",
)  # a letter with its accent as one character, or as two, as file systems of Apple write it


def find_subject(text: str, subjects: Sequence[str]) -> tuple[int, int] | None:
    """Characters [start, end) of the first of the subjects that stands in the text as whole words, in any case.

    A word ends where no letter follows. Letters of scripts without spaces between words end one on either side.
    """
    for subject in subjects:
        for form in dict.fromkeys((subject, *(unicodedata.normalize(form, subject) for form in _FORMS))):
            for found in re.finditer(f"(?=({re.escape(form)}))", text, re.IGNORECASE):
                start, end = found.span(1)
                if not (_joined(text, start) or _joined(text, end)):
                    return start, end
    return None


def _joined(text: str, place: int) -> bool:
    """Whether the characters before and after the place are of one word."""
    around = text[max(place - 1, 0) : place + 1]
    return 0 < place < len(text) and all(_letter(each) for each in around) and not any(map(_unspaced, around))


def _letter(character: str) -> bool:
    """Letters, their marks, digits, and characters that join words, such as `_`."""
    return character.isalnum() or unicodedata.category(character) in ("Mn", "Mc", "Pc")


def _unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _UNSPACED)
