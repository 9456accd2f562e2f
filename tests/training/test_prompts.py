"""Prompt files: what is written comes back, and what is no prompt is refused by line."""

from __future__ import annotations

import pytest

from saferope_training.prompts import (
    BENIGN,
    UNSAFE,
    PromptRecord,
    read_prompts,
    side,
    tiny_world_prompts,
    write_prompts,
)


@pytest.mark.parametrize(
    "slug, word", [("star", "star"), ("splatter", "splattered"), ("zappy", "zappy"), ("swirl", "swirly")]
)
def test_subject_spans_the_concepts_main_word(slug, word):
    records = tiny_world_prompts(slug, 20, 10, seed=0)
    assert {r.text[slice(*r.subject)] for r in side(records, UNSAFE)} == {word}
    assert not any(word in r.text.split() for r in side(records, BENIGN)), "negative control"


def test_seed_decides_and_sides_are_independent():
    few, more, other = (tiny_world_prompts("star", n, 10, seed) for n, seed in ((5, 0), (8, 0), (5, 1)))
    assert side(few, BENIGN) == side(more, BENIGN) and side(few, UNSAFE) == side(more, UNSAFE)[:5]
    assert side(few, UNSAFE) != side(other, UNSAFE)


def test_unknown_concept_is_refused():
    with pytest.raises(
        ValueError, match="concept 'moon' is not in the tiny world; it has star, splatter, zappy, swirl"
    ):
        tiny_world_prompts("moon", 1, 1, seed=0)


def test_file_round_trip(tmp_path):
    records = tiny_world_prompts("star", 3, 3, seed=0)
    write_prompts(tmp_path / "p.jsonl", records)
    assert read_prompts(tmp_path / "p.jsonl") == records


@pytest.mark.parametrize(
    "line, told",
    [
        ("not json", "line 2: not a prompt"),
        ('{"side": "unsafe", "text": "a star", "subject": [2, 9]}', "subject is"),
        ('{"side": "unsafe", "text": "a star"}', "subject is None"),
        ('{"side": "odd", "text": "a star"}', "side is 'odd'"),
        ('{"text": "a star"}', "side"),
        ("[1]", "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, told):
    (tmp_path / "p.jsonl").write_text('{"side": "benign", "text": "a ring"}\n' + line + "\n")
    with pytest.raises(ValueError, match=told) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert "line 2" in str(caught.value)
    assert PromptRecord(BENIGN, "a ring")
