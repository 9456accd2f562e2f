"""Hardening: new words that both encoders read, found by gradient, learned in rounds that resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saferope_core import load_concepts
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import Text, embed_with_gradients, encode
from saferope_training.flux.new_words import NewWords, load_words, random_words, save_words, spoken
from saferope_training.making import harden
from saferope_training.making.hardened import hardened
from saferope_training.making.recipe import PROMPT_FILE, Recipe
from saferope_training.prompts import PromptRecord, read_prompts
from saferope_training.settings import Settings

FEW = {"unsafe_prompts": 8, "benign_prompts": 8, "timesteps": (1.0,), "unlearn_at": (1.0,), "reservoir": 256}
FEW |= {"steps": 2, "phase": 1, "batch": 2, "relative_rank": 0}


@pytest.fixture(scope="module")
def model():
    return load_model("tinyworld")


def words_of(model, *words: str) -> NewWords:
    """New words with the vectors of known ones."""
    pairs = (
        (pipe_encoder.get_input_embeddings().weight, tokenizer)
        for pipe_encoder, tokenizer in (
            (model.pipe.text_encoder_2, model.pipe.tokenizer_2),
            (model.pipe.text_encoder, model.pipe.tokenizer),
        )
    )
    return NewWords(*(weight[tokenizer.convert_tokens_to_ids(list(words))].clone() for weight, tokenizer in pairs))


def test_a_new_word_with_a_known_words_vectors_is_that_word(model):
    plain = encode(model, ["a red star , center", "a blue heart"])
    words, own = words_of(model, "star", "heart"), (model.pipe.tokenizer, model.pipe.tokenizer_2)
    star, heart = words.names
    with spoken(model, words), spoken(model, random_words(model, 3, torch.Generator().manual_seed(0))):
        same = encode(model, [f"a red {star} , center", f"a blue {heart}"])
        swapped = encode(model, [f"a red {heart} , center", f"a blue {star}"])
    assert torch.equal(same.states, plain.states) and torch.equal(same.pooled, plain.pooled)
    assert not torch.allclose(swapped.states, plain.states, atol=1e-2), "control"
    assert (model.pipe.tokenizer, model.pipe.tokenizer_2) == own
    assert torch.equal(encode(model, ["a red star , center"]).states, plain.states[:1]), "hooks are gone"


def test_gradients_reach_the_vectors_of_the_words_that_were_said(model):
    words = random_words(model, 2, torch.Generator().manual_seed(0))
    vectors = [words.t5.requires_grad_(), words.clip.requires_grad_()]
    with spoken(model, words, ["newone", "newtwo"]):
        text = Text(*embed_with_gradients(model, ["a newone , center"]))
    (text.states.square().sum() + text.pooled.square().sum()).backward()
    for vector in vectors:
        assert vector.grad[0].any() and not vector.grad[1].any()


def test_names_are_digests_and_files_keep_words(model, tmp_path):
    words = random_words(model, 3, torch.Generator().manual_seed(0))
    save_words(tmp_path / "w.safetensors", words)
    assert load_words(tmp_path / "w.safetensors").names == words.names == (words + words).names[:3]
    other = NewWords(words.t5 + 1e-6, words.clip)
    assert len({*words.names, *other.names}) == 6 and all(name.isalnum() for name in words.names)


def test_prompts_with_new_words_keep_all_else():
    records = [PromptRecord("unsafe", "a red star here", (6, 10), instead="a red circle here")]
    (record,) = harden.with_words(records, NewWords(torch.zeros(1, 4), torch.zeros(1, 4)), 1)
    first, last = record.subject
    assert record.text[:first] + "star" + record.text[last:] == "a red star here"
    assert record.instead == "a red circle here" and record.text[first:last].startswith("saferope")


def test_rounds_find_words_learn_them_and_resume(model, tmp_path, monkeypatch):
    monkeypatch.setattr(harden, "WORDS", 4)
    monkeypatch.setattr(harden, "STEPS", 3)
    recipe = Recipe(model, Settings(**FEW, harden=2), tmp_path)
    path = hardened(recipe)
    plain, hard = (load_concepts(file)[0] for file in (tmp_path / "star.safetensors", path))
    assert path.name == "star.hardened.safetensors" and not torch.equal(plain.text.generator, hard.text.generator)
    first, second = (load_words(tmp_path / f"harden-{number}.safetensors").names for number in (1, 2))
    texts = " ".join(record.text for record in read_prompts(tmp_path / "harden-2" / PROMPT_FILE))
    assert len({*first, *second}) == 8 and all(name in texts for name in (*first, *second))
    before = path.read_bytes()
    monkeypatch.setattr(harden, "found_words", lambda *_: pytest.fail("words are searched for again"))
    assert hardened(Recipe(model, Settings(**FEW, harden=2), tmp_path)).read_bytes() == before


def test_families_without_flux_1_s_two_encoders_are_refused(model, tmp_path):
    recipe = Recipe(model, Settings(**FEW, harden=1), tmp_path)
    recipe._model = replace(model, geometry=replace(model.geometry, family="chroma"))
    with pytest.raises(ValueError, match=r"harden: got a model of the family 'chroma', expected FLUX.1"):
        hardened(recipe)


def test_found_words_bring_the_concept_back(model, tmp_path, monkeypatch):
    """Of a protection that turns nothing: after some steps, velocities are nearer to the concept's than at first."""
    from saferope_training.making import heads, material, recipe

    settings = Settings(**FEW)
    made = Recipe(model, settings, tmp_path)
    made.train()
    critical, _ = heads.load_critical(tmp_path / recipe.CRITICAL, model.geometry)
    seen = material.load_material(model, made.prompts(), settings.unlearn_at, tmp_path / recipe.LATENTS)
    still = tuple(torch.zeros(len(critical.heads), width, width) for width in critical.widths)
    unsafe = [record for record in made.prompts() if record.side == "unsafe"]
    errors = []
    real = harden.velocity

    def watched(*args):
        result = real(*args)
        if result.requires_grad:
            errors.append(result)
        else:
            wanted.append(result)
        return result

    wanted: list[torch.Tensor] = []
    monkeypatch.setattr(harden, "velocity", watched)
    monkeypatch.setattr(harden, "WORDS", 4)
    monkeypatch.setattr(harden, "STEPS", 25)
    words = harden.found_words(model, critical, still, seen, unsafe, settings, 1)
    off = [(a - b).square().mean().item() for a, b in zip(errors, wanted, strict=True)]
    assert sum(off[-5:]) < 0.5 * sum(off[:5]), off
    again = harden.found_words(model, critical, still, seen, unsafe, settings, 2)
    assert not set(words.names) & set(again.names), "another round finds others"
