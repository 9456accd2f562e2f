"""Hardening: finds words that bring the concept back under a concept file, so that training can learn them too.

A list of words for a concept is never complete. Gradient descent finds new ones: vectors in the place of the concept's
word. With them the protected model has the velocities that the unprotected one has with the word itself (concept
inversion: Pham et al., 2024). The vectors start at random, so that they end different.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saferope_core import CriticalHeads

from ..flux.attach import attached
from ..flux.models import Model, Text, embed_with_gradients, velocity
from ..flux.new_words import NewWords, random_words, spoken
from ..prompts import PromptRecord
from ..settings import Settings
from .batch import UNLEARN, Material, draw, latents, prompts
from .rotation import TrainableRotation

WORDS = 16  # found in a round
STEPS = 60  # of a round; a new word for a base model's concept takes 30
RATE = 0.3  # of Adam, times the spread of an encoder's embeddings
_SEED = 7_000_003  # apart from training's seeds
_EACH = 2  # prompts of a batch that try a word


def found_words(
    model: Model,
    heads: CriticalHeads,
    generators: tuple[Tensor, Tensor],
    material: Material,
    records: Sequence[PromptRecord],
    settings: Settings,
    number: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NewWords:
    """WORDS new words that bring the concept back under the generators (text, image) of these heads.

    `records` are the material's unsafe prompts. Each round, `number`, finds other words.
    """
    chosen = replace(settings, seed=settings.seed + _SEED * number, batch=_EACH * WORDS, blind=0.0, blind_text=0.0)
    words = random_words(model, WORDS, torch.Generator().manual_seed(chosen.seed))
    vectors = [words.t5.requires_grad_(), words.clip.requires_grad_()]
    groups = [{"params": [each], "lr": RATE * each.detach().std().item()} for each in vectors]
    optimiser = torch.optim.Adam(groups)
    acts_on = {"text": settings.acts_on, "image": settings.acts_on_image}
    rotation = TrainableRotation(heads, model.geometry, acts_on, *(each.to(model.device) / 2 for each in generators))
    names = [f"word{place}" for place in range(WORDS)]
    for step in range(STEPS):
        batch = draw(material, chosen, step, UNLEARN)
        x = latents(model, material, batch).noised
        with torch.no_grad():
            wanted = velocity(model, x, batch.times, prompts(material, batch))
        texts = [said(records[place], names[turn % WORDS])[0] for turn, place in enumerate(batch.index.tolist())]
        optimiser.zero_grad()
        for part in torch.arange(len(texts)).split(settings.passes_of or len(texts)):
            with spoken(model, words, names):
                text = Text(*embed_with_gradients(model, [texts[place] for place in part.tolist()]))
            with attached(model.transformer, rotation.rotate):
                error = (velocity(model, x[part], batch.times[part], text) - wanted[part]).square().mean((1, 2))
                (error.sum() / len(texts)).backward()
        optimiser.step()
        progress(step + 1, STEPS)
    return NewWords(*(each.detach() for each in vectors))


def with_words(records: Sequence[PromptRecord], words: NewWords, per_word: int) -> list[PromptRecord]:
    """Unsafe prompts in which new words stand for the concept, `per_word` of each; `instead` stays."""
    marked = [record for record in records if record.subject is not None]
    result = []
    for number, name in enumerate(words.names * per_word):
        record = marked[number % len(marked)]
        text, subject = said(record, name)
        result.append(replace(record, text=text, subject=subject))
    return result


def said(record: PromptRecord, word: str) -> tuple[str, tuple[int, int]]:
    """The prompt's text with another word for its subject, and where that word stands."""
    assert record.subject is not None, "an unsafe prompt without its subject marked"
    first, last = record.subject
    return record.text[:first] + word + record.text[last:], (first, first + len(word))
