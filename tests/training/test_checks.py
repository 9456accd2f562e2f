"""What a run refuses before its model is asked for anything: no forward, no encoding."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from PIL import Image

from saferope_training.flux.models import Model
from saferope_training.making import material, recipe
from saferope_training.making.recipe import Recipe
from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord, write_prompts

FULL = "red " * 23  # with T5's end all 24 tokens of the tiny world
EMOJI = "\U0001f31f"


def unsafe(text: str, word: str = "star") -> PromptRecord:
    return PromptRecord(UNSAFE, text, (text.index(word), text.index(word) + len(word)))


def benign(text: str, **more) -> PromptRecord:
    return PromptRecord(BENIGN, text, **more)


GOOD = [unsafe("a red star"), unsafe("a blue star"), benign("a red heart"), benign("a blue heart")]
TINY = {"shape": "heart", "color": "red", "background": "white", "place": "left"}


class Asked(Exception):
    """The model was asked for something."""


@pytest.fixture
def started(model: Model, settings, tmp_path, monkeypatch):
    """started(records, ...) tries to make a concept of the prompts; Asked where nothing was found wrong with them."""

    def asked(*_, **__):
        raise Asked

    for forward in (model.transformer, model.pipe.text_encoder, model.pipe.text_encoder_2):
        monkeypatch.setattr(forward, "forward", asked)
    monkeypatch.setattr(recipe.models, "with_cache", lambda model, folder: model)

    def start(records, **chosen):
        path = tmp_path / "p.jsonl"
        write_prompts(path, records)
        counts = {f"{side}_prompts": sum(r.side == side for r in records) for side in (UNSAFE, BENIGN)}
        files = {"unsafe": str(path), "benign": str(path)}
        Recipe(model, replace(settings, **counts | files | chosen), tmp_path / "out").train()

    return start


def test_good_prompts_are_looked_at(started):
    """The control: the same prompts that are refused below with one thing changed."""
    with warnings.catch_warnings(), pytest.raises(Asked):
        warnings.simplefilter("error")
        started(GOOD)


@pytest.mark.parametrize(
    "records, chosen, told",
    [
        ([*GOOD, unsafe("a red moon", "moon")], {}, "does not know 'moon' of the concept's word 'moon'"),
        (
            [*GOOD, unsafe("a red star night", "star night")],
            {},
            "does not know 'night' of the concept's word 'star night'",
        ),
        ([*GOOD, unsafe(f"a {EMOJI}", EMOJI)], {}, f"does not know '{EMOJI}' of the concept's word"),
        ([*GOOD, unsafe(FULL + "red star")], {}, "its subject 'star', .* is not whole within the first 24 tokens"),
        ([unsafe("star " + FULL), *GOOD[2:]], {}, "unsafe prompts: got none that leaves padding"),
        ([unsafe("star " + FULL[4:]), *GOOD[2:]], {}, "unsafe prompts: got none that leaves padding"),
        ([*GOOD[:2], benign(FULL)], {}, "benign prompts: got none that leaves padding"),
        (GOOD[1:], {"timesteps": (1.0, 0.5)}, "would be seen 2 times, expected at least 3, its rank"),
        (GOOD, {"rank": 13}, "got 17 dimensions for text tokens, expected at most a head's 16"),
        (GOOD, {"concept": "My star"}, "slug is 'My star', expected small letters"),
        ([*GOOD, benign("a heart", scene=TINY | {"shape": "moon"})], {}, "scene: shape is 'moon', expected one of"),
        ([*GOOD, benign("a heart", scene={"shape": "heart"})], {}, "scene: got .* expected the fields shape, color"),
        ([*GOOD, benign("a heart", image="nowhere.png")], {}, "picture nowhere.png: cannot be read"),
    ],
)
def test_what_can_be_known_is_refused_first(started, records, chosen, told):
    with pytest.raises(ValueError, match=told):
        started(records, **chosen)


def test_one_prompt_with_padding_is_enough(started):
    with pytest.raises(Asked):
        started([*GOOD, unsafe("star " + FULL), benign(FULL)])
    with pytest.raises(Asked):
        started([unsafe("star " + FULL), benign(FULL)], padding_rank=0, rank=2)


def test_other_words_that_are_unknown_are_told(started):
    with (
        pytest.warns(UserWarning, match=r"does not know 2 of their words, .* same one: 'moon', 'sun'"),
        pytest.raises(Asked),
    ):
        started([*GOOD, unsafe("a star , moon"), benign("a sun"), benign("moon")])


def test_pictures_that_end_early_are_told(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    records = [benign("a heart", image=str(tmp_path / "a.png")), benign("a heart", scene=TINY)]
    material.require_pictures(records, 96)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png: cannot be read .* mend it or take it out"):
        material.require_pictures(records, 96)
