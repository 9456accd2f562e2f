"""The prompt that stands in for an unsafe one: its grammar, and where its words come from."""

from __future__ import annotations

import json
import re

import pytest

from saferope_core import presets
from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord, read_prompts, side, write_prompts
from saferope_training.prompts.instead import replaced, stand_ins, with_instead
from saferope_training.prompts.sources import prompts_for
from saferope_training.settings import Settings
from tinyworld import world


def spanned(text, subject):
    return text, (text.index(subject), text.index(subject) + len(subject))


@pytest.mark.parametrize(
    ("text", "subject", "word", "expected"),
    [
        ("a red star , left", "star", "circle", "a red circle , left"),
        ("an orange star", "orange star", "blue ring", "a blue ring"),
        ("A star at night", "star", "owl", "An owl at night"),
        ("see the star", "star", "owl", "see the owl"),
        ("wheat field, Van Gogh style", "Van Gogh style", "plain photograph", "wheat field, plain photograph"),
        ("a splattered orange circle", "splattered", "", "an orange circle"),
        ("a quiet splattered orange circle", "splattered", "", "a quiet orange circle"),
        ("a photo of a naked person", "naked person", "", "a photo"),
        ("a photo of a naked person on a beach", "naked person", "", "a photo on a beach"),
        ("a naked person, soft light", "naked person", "", "soft light"),
        ("wheat field with crows, Van Gogh style", "Van Gogh style", "", "wheat field with crows"),
        ("Van Gogh style, a vase, blue", "Van Gogh style", "", "a vase, blue"),
        ("one, star, two", "star", "", "one, two"),
        ("a quiet red heart in the center", "heart", "", "a quiet red in the center"),
        ("star", "star", "", ""),
        ("星の写真", "星", "月", "月の写真"),
    ],
)
def test_the_rest_of_the_prompt_stays_as_it_is(text, subject, word, expected):
    assert replaced(*spanned(text, subject), word) == expected


def test_words_take_turns_on_the_unsafe_side_alone():
    records = [PromptRecord(UNSAFE, *spanned(f"a star {n}", "star")) for n in range(3)]
    given = with_instead([records[0], PromptRecord(BENIGN, "a star"), *records[1:]], ["ring", "owl", ""])
    assert [record.instead for record in given] == ["a ring 0", None, "an owl 1", "a 2"]
    assert stand_ins(given) == ["", "an owl", "ring"]


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_the_tiny_world_says_its_scenes_without_the_concept(slug):
    """As the world itself would say them, so that the base model knows the prompt."""
    records = side(prompts_for(Settings(concept=slug)), UNSAFE)
    word, own = world.WORDS[slug][0], world.CONCEPTS[slug].instead
    assert own or slug in ("splatter", "swirl"), "without a word the picture is whole"
    for record in records:
        assert word not in record.instead.split() and "  " not in record.instead
        assert set(record.instead.split()) <= set(world.vocabulary()) | {","}
        lost = len(record.text.split()) - len(record.instead.split())
        assert lost == {"splatter": 1, "swirl": 3}.get(slug, 0)


def disagreeing(text):
    """How many articles do not fit the letter that follows."""
    return len(re.findall(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE))


@pytest.mark.parametrize("name", presets.names())
def test_each_subject_of_a_preset_has_words_of_its_own(name):
    preset = presets.load(name)
    records = side(prompts_for(Settings(concept=name, model="some FLUX")), UNSAFE)
    words = dict(zip(preset["subjects"], preset["instead"], strict=True))
    for record in records:
        subject = record.text[slice(*record.subject)]
        assert words[subject] in record.instead and subject not in record.instead
        assert disagreeing(record.instead) <= disagreeing(record.text)
    assert not {word for phrase in preset["instead"] for word in phrase.lower().split()} & set(
        "naked nude topless bare blood bloody bleeding gore severed pikachu pokémon gogh vincent starry".split()
    )


def test_own_words_come_first_then_those_of_the_file_then_none(tmp_path):
    lines = [
        {"side": "unsafe", "text": "a red star", "subject": [6, 10]},
        {"side": "unsafe", "text": "a blue star", "subject": [7, 11], "instead": "a blue sky"},
    ]
    path = tmp_path / "unsafe.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    benign = tmp_path / "benign.txt"
    benign.write_text("a dog")
    s = {"unsafe": str(path), "benign": str(benign), "unsafe_prompts": 2, "benign_prompts": 1}
    assert [record.instead for record in prompts_for(Settings(**s))] == ["a red", "a blue sky", None]
    own = prompts_for(Settings(**s, instead=("moon", "owl")))
    assert [record.instead for record in own] == ["a red moon", "a blue owl", None]
    write_prompts(tmp_path / "again.jsonl", own)
    assert read_prompts(tmp_path / "again.jsonl") == own


def test_an_odd_stand_in_is_refused():
    for odd, told in ((3, "instead is 3, expected a string or null"), ("\ud800", "half of a character")):
        with pytest.raises(ValueError, match=told):
            PromptRecord(UNSAFE, "a star", (2, 6), instead=odd)
