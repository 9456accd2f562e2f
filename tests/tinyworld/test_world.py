"""The tiny world's words: what is held out stays out, and a marked word is the word."""

import random

import pytest
import torch

from tinyworld import world
from tinyworld.render import SIZE, render

HELD_OUT_WORDS = {word for words in world.WORDS.values() for word in words[1:]} | set(world.HELD_OUT_MODIFIERS)


def words_of(prompts) -> set[str]:
    return {word for prompt in prompts for word in prompt.text.split()}


@pytest.mark.parametrize("slug", world.CONCEPTS)
@pytest.mark.parametrize("held_out", [False, True])
def test_unsafe_prompts_mark_a_word_of_their_concept(slug, held_out):
    prompts = world.unsafe_prompts(slug, 60, seed=1, held_out=held_out)
    marked = {prompt.text[slice(*prompt.subject)] for prompt in prompts}
    expected = set(world.WORDS[slug][1:]) if held_out else {world.WORDS[slug][0]}
    assert marked == expected
    assert all(world.has_concept(prompt.scene, slug) for prompt in prompts)


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_held_out_words_and_templates_stay_out_of_concept_training(slug):
    trained_on = world.unsafe_prompts(slug, 200, seed=2) + world.benign_prompts(slug, 200, seed=2)
    assert not words_of(trained_on) & HELD_OUT_WORDS
    assert words_of(world.unsafe_prompts(slug, 200, seed=2, held_out=True)) & HELD_OUT_WORDS  # the control


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_benign_prompts_never_ask_for_the_concept(slug):
    assert not any(world.has_concept(p.scene, slug) for p in world.benign_prompts(slug, 300, seed=3))
    assert not words_of(world.benign_prompts(slug, 300, seed=3)) & set(world.WORDS[slug])


@pytest.mark.parametrize("slug", world.CONCEPTS)
def test_neighbours_are_the_named_ones(slug):
    spec = world.CONCEPTS[slug]
    prompts = world.neighbour_prompts(slug, 60, seed=4)
    assert {getattr(prompt.scene, spec.field) for prompt in prompts} == set(spec.neighbours)


def test_unseen_combinations_are_a_tenth_and_never_trained_on():
    combinations = [
        world.Scene(shape, color, background, place)
        for shape in world.SHAPES
        for color in world.COLORS
        for background in world.BACKGROUNDS
        for place in world.PLACES
    ]
    share = sum(map(world.is_unseen, combinations)) / len(combinations)
    assert 0.07 < share < 0.13
    assert not any(world.is_unseen(p.scene) for p in world.training_captions(500, seed=5))
    assert all(world.is_unseen(p.scene) for p in world.benign_prompts("star", 50, seed=5, test=True))


def test_prompts_depend_on_the_seed_alone():
    assert world.unsafe_prompts("star", 20, seed=6) == world.unsafe_prompts("star", 20, seed=6)
    assert world.unsafe_prompts("star", 20, seed=6) != world.unsafe_prompts("star", 20, seed=7)


def test_every_word_is_in_the_vocabulary():
    assert words_of(world.training_captions(3000, seed=8)) == set(world.vocabulary())


@pytest.mark.parametrize("shape", world.SHAPES)
def test_pictures_are_in_range_and_tell_scenes_apart(shape):
    scene = world.Scene(shape, "yellow", "navy", "center")
    picture = render(scene, random.Random(9))
    assert picture.shape == (3, SIZE, SIZE)
    assert picture.min() >= -1 and picture.max() <= 1
    others = [world.Scene(shape, "yellow", "navy", "center", "splatter"), world.Scene(shape, "red", "navy", "center")]
    assert torch.equal(picture, render(scene, random.Random(9)))
    for other in others:
        assert (picture - render(other, random.Random(9))).abs().mean() > 0.02
