"""The paper's Table 2, and the effect of each of our differences from it: variants of a concept, same statistics."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from saferope_training import processes
from saferope_training.flux.models import Model
from saferope_training.making.recipe import PROMPT_FILE, STATISTICS, Recipe
from saferope_training.settings import PAPER
from saferope_training.stages import RECORD, Progress

from ..evaluation.methods import Method, concept_file
from .contenders import settings_for

CALIBRATED = {**PAPER, "gate": "calibrated"}
SHARING = {
    "independent": {},
    "shared scaled": {"sharing": "shared"},  # the image's generators are the text's times 0.01
    "shared": {"sharing": "shared", "image_scale": 1.0},
}
RANKS = (2, 5, 10)
VARIANTS = {
    f"paper, {sharing}, rank {rank}": {**CALIBRATED, **how, "rank": rank}
    for sharing, how in SHARING.items()
    for rank in RANKS
}
VARIANTS |= {
    "paper, gate 0.7": PAPER,
    "ours": {},
    "ours, risk in the unsafe subspace": {"relative_rank": 0},
    "ours without reach": {"reach": 0},
    "ours without padding and words": {"padding_rank": 0, "words_rank": 0, "rank": 16},
    "ours without image bases": {"image_rank": 0},
    "ours, no prompt blind": {"blind": 0.0},
    "ours, away": {"objective": "away"},
    "ours, at strength 1 alone": {"strengths": (1.0, 1.0)},
    "ours, any angle": {"max_angle": 0.0},
}


def variants(
    model: Model, folder: Path, concepts: Sequence[str], progress: Progress, chosen: dict = VARIANTS
) -> list[Method]:
    """Every variant of every concept, trained in `folder/<slug>.<number>`; extraction is done once,
    in `folder/<slug>`."""
    found = []
    for slug in concepts:
        plain = settings_for(model, slug)
        Recipe(model, plain, folder / slug, progress).extract()
        for number, (name, changes) in enumerate(chosen.items(), start=1):
            place = folder / f"{slug}.{number:02d}"
            _branch(folder / slug, place)
            path = Recipe(model, replace(plain, **changes), place, progress).train()
            found.append(concept_file(path, 1.0, name, slug))
    return found


def _branch(base: Path, place: Path) -> None:
    """A folder that starts with the products that do not depend on the variant."""
    if processes.is_main() and not place.exists():
        part = place.with_name(f".{place.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in (PROMPT_FILE, RECORD):
            shutil.copy(base / name, part)
        try:  # a stage replaces its products and never writes into them, so all variants may share the one file
            os.link(base / STATISTICS, part / STATISTICS)
        except OSError:  # a file system without links
            shutil.copy(base / STATISTICS, part)
        part.rename(place)
    processes.wait()
