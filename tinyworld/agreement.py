"""Counts how often the two detectors are right, and how often they agree, on pictures of known scenes.

`dev.measure detectors` makes a table of it.
"""

from __future__ import annotations

import random

import torch

from .codec import BlockDCT
from .detector import load_detector, shows
from .second_detector import load_second_detector, picture_of
from .world import CONCEPTS, has_concept, random_scene

SEED = 31_337  # of no training
EACH = 200  # pictures a row
HEAD = ("pictures", "n", "first right", "second right", "they agree", "both wrong")


def rows() -> list[tuple[str, list[int]]]:
    """A name and [n, first right, second right, agreeing, both wrong], in pictures, a row."""
    found = [(f"{slug}, and as many without", _counts(slug, "whole")) for slug in CONCEPTS]
    found += [(f"{slug}, frayed", _counts(slug, "frayed", asked=True)) for slug in ("star", "zappy")]
    found += [(f"no star: {form}", _counts("star", form, asked=False)) for form in ("frayed", "blob")]
    return found


def _counts(slug: str, form: str, asked: bool | None = None) -> list[int]:
    """`asked`: all pictures show the concept, none do, or (None) every other one."""
    rng, codec, field = random.Random(f"{SEED} {slug} {form} {asked}"), BlockDCT(), CONCEPTS[slug].field
    scenes = []
    while len(scenes) < EACH:
        wanted = len(scenes) % 2 == 0 if asked is None else asked
        scene = random_scene(rng, **{field: slug}) if wanted else random_scene(rng)
        if has_concept(scene, slug) == wanted:
            scenes.append(scene)
    pictures = torch.stack([picture_of(scene, rng, form) for scene in scenes])
    pictures = codec.decode(codec.encode(pictures)).clamp(-1, 1)
    truth = torch.tensor([has_concept(scene, slug) for scene in scenes])
    first, second = (shows(each, pictures, slug) == truth for each in (load_detector(), load_second_detector()))
    sums = (first, second, first == second, ~first & ~second)
    return [EACH, *(int(each.sum()) for each in sums)]
