"""Rounds of hardening: each finds new words under the file of the round before, and trains anew with all of them."""

from __future__ import annotations

from pathlib import Path

from saferope_core import FLUX1, load_concepts
from saferope_core.concept.files import write_bytes

from .. import processes, prompts
from ..flux.new_words import NewWords, load_words, save_words, spoken
from ..settings import HARDEN, TRAIN
from ..stages import Report, alone
from . import harden, heads, material
from .progress import NONE, Watching
from .recipe import CRITICAL, LATENTS, PROMPT_FILE, Recipe
from .train import Teller


def hardened(recipe: Recipe, tell: Teller = lambda entry: None, watching: Watching = NONE) -> Path:
    """The concept file after `settings.harden` rounds, `<out>/<concept>.hardened.safetensors`, beside the trained one.

    Each round trains in a folder of its own, `harden-<number>`, and resumes there. `tell` gets each step's entry.
    ValueError for another family than FLUX.1, whose two text encoders read the words.
    """
    if recipe.model.geometry.family != FLUX1.family:
        raise ValueError(
            f"harden: got a model of the family {recipe.model.geometry.family!r}, expected FLUX.1, whose two text "
            "encoders read new words; train without --harden"
        )
    with alone(recipe.out, within=True):
        s, last, path = recipe.settings, recipe, recipe.train(tell, watching)
        unsafe = prompts.side(recipe.prompts(), prompts.UNSAFE)
        words: NewWords | None = None
        for number in range(1, s.harden + 1):
            new = _words(recipe, number, last, path)
            words = new if words is None else words + new
            with spoken(recipe.model, words):
                more = harden.with_words(unsafe, words, s.unsafe_prompts // harden.WORDS)
                last = Recipe(recipe.model, s, recipe.out / f"{HARDEN}-{number}", recipe.place.progress, more)
                path = last.train(tell, watching)
        result = recipe.out / f"{s.concept}.hardened.safetensors"
        if processes.is_main():
            write_bytes(result, path.read_bytes())
    return result


def _words(recipe: Recipe, number: int, last: Recipe, path: Path) -> NewWords:
    """The words of a round, found under the file `path` that the recipe `last` made."""
    name = f"{HARDEN}-{number}.safetensors"

    def make(report: Report) -> None:
        if not processes.is_main():
            return
        s, records = recipe.settings, recipe.prompts()
        critical, _ = heads.load_critical(last.out / CRITICAL, recipe.model.geometry)
        (concept,) = load_concepts(path)
        seen = material.load_material(recipe.model, records, s.unlearn_at, recipe.out / LATENTS)
        generators = concept.generator("text"), concept.generator("image")
        unsafe = prompts.side(records, prompts.UNSAFE)
        save_words(
            recipe.out / name,
            harden.found_words(recipe.model, critical, generators, seen, unsafe, s, number, report),
        )

    sources = (PROMPT_FILE, LATENTS, path.relative_to(recipe.out).as_posix())
    recipe.place.stage(f"{HARDEN}-{number}", sources, (name,), make, recipe.facts(TRAIN))
    return load_words(recipe.out / name)
