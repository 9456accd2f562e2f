"""What is known before a model is asked: words that a vocabulary lacks, prompts that say too little, names and
ranks."""

from __future__ import annotations

import pytest

from saferope_core import (
    BENIGN,
    PADDING,
    SUBJECT,
    UNSAFE,
    WORDS,
    Ranks,
    require_known,
    require_names,
    require_vectors,
    unknown_parts,
    unknown_words,
)

COUNTS = {(side, kind): 10 for side in (UNSAFE, BENIGN) for kind in (SUBJECT, WORDS, PADDING)}
RANKS = Ranks(6, 5, 5, 8, 8)


def test_unknown_parts_are_those_of_the_unknown_token():
    ids, offsets = [3, 2, 5, 2, 2, 1], [(0, 1), (2, 4), (4, 6), (7, 9), (9, 9), (0, 0)]
    assert unknown_parts(ids, offsets, 2) == [(2, 4), (7, 9)], "a token without characters is no word"
    assert unknown_parts(ids, offsets, None) == []


def test_unknown_words_reach_from_space_to_space():
    assert unknown_words("a xyz, b z b! z", [(3, 4), (9, 10), (14, 15)]) == ["xyz,", "z"]
    assert unknown_words("a xyz", []) == []


@pytest.mark.parametrize(
    "part, known", [((0, 2), True), ((6, 9), True), ((2, 6), False), ((5, 8), False), ((1, 3), False)]
)
def test_the_concepts_word_must_be_known_whole(part, known):
    if known:
        return require_known("a star here", (2, 6), [part])
    shown = "a star here"[max(2, part[0]) : min(6, part[1])]
    with pytest.raises(ValueError, match=f"does not know '{shown}' of the concept's word 'star', .* expected a word"):
        require_known("a star here", (2, 6), [part])


@pytest.mark.parametrize(
    "changes, ranks, looks, told",
    [
        ({}, RANKS, 3, None),
        ({(UNSAFE, SUBJECT): 2}, RANKS, 3, None),
        ({(UNSAFE, SUBJECT): 2}, RANKS, 2, "would be seen 4 times, expected at least 6"),
        ({(UNSAFE, PADDING): 0}, RANKS, 3, "unsafe prompts: got none that leaves padding"),
        ({(BENIGN, PADDING): 0}, RANKS, 3, "benign prompts: got none that leaves padding"),
        ({(BENIGN, PADDING): 0, (UNSAFE, PADDING): 0}, Ranks(6), 3, None),
        ({(UNSAFE, WORDS): 0}, RANKS, 3, "unsafe prompts: got none with a word beside the concept's"),
        ({}, Ranks(112, 5, 5, 6), 30, None),
        ({}, Ranks(113, 5, 5, 6), 30, "got 129 dimensions for text tokens, expected at most a head's 128"),
        ({}, Ranks(6, 0, 0, 8, 121), 3, "got 129 dimensions for image tokens"),
    ],
)
def test_vectors_must_be_enough(changes, ranks, looks, told):
    if told is None:
        return require_vectors(COUNTS | changes, looks, ranks, 128)
    with pytest.raises(ValueError, match=told):
        require_vectors(COUNTS | changes, looks, ranks, 128)


def test_names_are_those_of_a_concept():
    require_names("star-2", "Star", "")
    for slug, name, told in (("My star", "Star", "slug"), ("star", " ", "name is empty"), ("star", "a\nb", "control")):
        with pytest.raises(ValueError, match=told):
            require_names(slug, name, "")
