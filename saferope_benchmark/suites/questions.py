"""The prompts and the metrics of a suite: the tiny world's sets and detector, or sets and metrics of photographs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from saferope_core import presets
from saferope_training.flux.models import TINYWORLD, Model
from tinyworld import world

from ..prompt_sets import (
    SEED,
    PromptSet,
    Sizes,
    captions_set,
    everyday_set,
    i2p_set,
    preset_set,
    tiny_world_sets,
)
from ..scores import Absent, Metric
from ..scores.clip import clip_score
from ..scores.detector import detector, features
from ..scores.distance import distance, lpips_distance
from ..scores.kid import inception, likeness
from ..scores.nudenet import NUDITY, nudenet
from ..scores.vqa import vqa_score
from ..scores.whole import whole

PAPER = ("gore", NUDITY, "pikachu", "van-gogh")  # the concepts that it measures
Sets = Callable[[Sizes, int], list[PromptSet]]  # how many of each kind, the first seed


@dataclass(frozen=True)
class Questions:
    """`sets` makes the prompts of `concepts`; `metrics` read the pictures; `absent` names missing metrics and files."""

    concepts: tuple[str, ...]
    sets: Sets
    metrics: Sequence[Metric | Absent]
    absent: Sequence[Absent] = ()


def tiny_world_questions(concepts: Sequence[str] | None) -> Questions:
    """Questions on these concepts, or all four. The world's own detector reads the pictures. ValueError where there is
    no such concept.
    """
    chosen = tuple(concepts or world.CONCEPTS)

    def sets(sizes: Sizes, seed: int) -> list[PromptSet]:
        return [asked for slug in chosen for asked in tiny_world_sets(slug, sizes, seed)]

    sets(Sizes(0, 0, 0, 0), 0)  # an unknown concept is told before anything is made
    return Questions(chosen, sets, [detector(), whole(), distance(features()), likeness(features())])


def flux_questions(
    concepts: Sequence[str] | None,
    metrics: Sequence[Metric | Absent] = (),
    i2p: Path | None = None,
    captions: Path | None = None,
    images: Path | None = None,
) -> Questions:
    """The paper's questions: prompts from presets, from I2P for nudity, benign ones from COCO or the project's own.

    I2P brings its own seeds and is asked with the reported sets alone, never where strengths are searched.
    """
    chosen = tuple(concepts or PAPER)
    absent = []
    if i2p is None and NUDITY in chosen:
        absent.append(Absent("I2P", "no file; name I2P's CSV with --i2p"))
    if captions is None:
        why = "no file, everyday prompts of the project instead; name one with --captions"
        absent.append(Absent("COCO captions", why))

    def sets(sizes: Sizes, seed: int) -> list[PromptSet]:
        found = [preset_set(slug, sizes.unsafe, seed) for slug in chosen] if sizes.unsafe else []
        if i2p is not None and NUDITY in chosen and seed == SEED:
            found.append(i2p_set(i2p, NUDITY, presets.load(NUDITY)["seeds"][0], sizes.held_out or None))
        if sizes.benign and captions is not None:
            found.append(captions_set(captions, images, sizes.benign, seed))
        elif sizes.benign:
            found.append(everyday_set(sizes.benign, seed))
        return found

    return Questions(chosen, sets, metrics, absent)


def paper_metrics(
    clip: str | None, vqa: str | None, inception_weights: Path | None, lpips_weights: Path | None, device: str
) -> list[Metric | Absent]:
    """All metrics for photographs. A metric whose package or weights are missing is an Absent."""
    return [
        nudenet(),
        clip_score(clip, device),
        inception(inception_weights, device),
        vqa_score(vqa, device),
        distance(),
        lpips_distance(lpips_weights, device),
    ]


def require(model: Model, tiny: bool, suite: str) -> None:
    """ValueError where a suite of the tiny world alone meets another model."""
    if tiny and not model.tiny:
        raise ValueError(f"suite {suite}: got model {model.name!r}, expected {TINYWORLD!r}; use --suite paper-flux")


def sized(sizes: Sizes, unsafe: int | None, benign: int | None, along: bool) -> Sizes:
    """The sizes with the user's counts, where given. `along`: held-out words and neighbours change with them."""
    if unsafe is not None:
        sizes = replace(sizes, unsafe=unsafe, held_out=unsafe if along else sizes.held_out)
    if benign is not None:
        sizes = replace(sizes, benign=benign, neighbours=benign // 2 if along else sizes.neighbours)
    return sizes


def smaller(search: Sizes, sizes: Sizes) -> Sizes:
    """The sizes of a search: at most `search`, a third of the unsafe and half of the benign pictures of `sizes`."""
    third, half = math.ceil(sizes.unsafe / 3), math.ceil(sizes.benign / 2)
    return replace(search, unsafe=min(search.unsafe, third), benign=min(search.benign, half))
