"""The questions of an evaluation to a model: sets of prompts, each prompt with the seed that every method shares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saferope_core import presets
from saferope_training.prompts import BENIGN, UNSAFE
from saferope_training.prompts.formats import csv_rows, row_text
from saferope_training.prompts.lines import read_text
from saferope_training.prompts.product import product_prompts
from saferope_training.prompts.readers import read_file, read_side

NEIGHBOURS = "neighbours"  # a kind beside UNSAFE and BENIGN: prompts nearest to the concept, whose content must stay
HELD_OUT = "held-out words"
SEED = 90_001  # far from the seeds people train with
# I2P's own columns, and the columns of copies that other projects evaluate with
_SEED_COLUMNS = ("sd_seed", "evaluation_seed")
_NUDITY_COLUMN = "nudity_percentage"


@dataclass(frozen=True)
class Ask:
    """One picture: its prompt, its seed and, if known, its right content: a tiny-world Scene's fields, or a picture."""

    text: str
    seed: int
    scene: dict | None = None
    image: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind (UNSAFE, BENIGN or NEIGHBOURS); of a concept, or of all where `concept` is empty.

    `words` say the concept to models that read text, such as CLIP.
    """

    name: str
    kind: str
    asks: tuple[Ask, ...]
    concept: str = ""
    words: str = ""

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.concept} {self.name}".lower()).strip("-")

    def part(self, first: int, count: int) -> PromptSet:
        """`count` of its prompts from number `first` on."""
        return replace(self, asks=self.asks[first : first + count])


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind; every method paints each."""

    unsafe: int = 64
    held_out: int = 64
    neighbours: int = 64
    benign: int = 128


def tiny_world_sets(slug: str, sizes: Sizes, seed: int = SEED) -> list[PromptSet]:
    """A tiny-world concept's four sets, of combinations that neither the model nor a concept was trained on; no empty
    one.
    """
    from tinyworld import world

    if slug not in world.CONCEPTS:
        raise ValueError(f"concept {slug!r}: got none of the tiny world's, expected one of {', '.join(world.CONCEPTS)}")
    drawn = (
        (UNSAFE, UNSAFE, world.unsafe_prompts(slug, sizes.unsafe, seed, test=True)),
        (HELD_OUT, UNSAFE, world.unsafe_prompts(slug, sizes.held_out, seed, held_out=True, test=True)),
        (NEIGHBOURS, NEIGHBOURS, world.neighbour_prompts(slug, sizes.neighbours, seed, test=True)),
        (BENIGN, BENIGN, world.benign_prompts(slug, sizes.benign, seed, test=True)),
    )
    return [
        PromptSet(name, kind, tuple(Ask(p.text, seed + i, asdict(p.scene)) for i, p in enumerate(prompts)), slug, slug)
        for name, kind, prompts in drawn
        if prompts
    ]


def preset_set(concept: str, count: int, seed: int = SEED) -> PromptSet:
    """`count` unsafe prompts of a preset's products: Unsafe-1K's recipe, with seeds of their own."""
    if concept not in presets.names():
        raise ValueError(f"concept {concept!r}: got no preset, expected one of {', '.join(presets.names())}")
    preset = presets.load(concept)
    records = product_prompts(UNSAFE, preset["subjects"], preset["modifiers"], preset["templates"], count, seed)
    asks = tuple(Ask(record.text, seed + i) for i, record in enumerate(records))
    return PromptSet("unsafe", UNSAFE, asks, concept, preset["seeds"][0])


def everyday_set(count: int, seed: int = SEED) -> PromptSet:
    """`count` benign prompts written for this project, for all concepts: where the user has no COCO captions."""
    preset = presets.load(presets.BENIGN)
    records = product_prompts(BENIGN, preset["subjects"], preset["modifiers"], preset["templates"], count, seed)
    return PromptSet("everyday", BENIGN, tuple(Ask(record.text, seed + i) for i, record in enumerate(records)))


def i2p_set(path: Path, concept: str, words: str, count: int | None = None, seed: int = SEED) -> PromptSet:
    """I2P's prompts that show nudity (nudity_percentage above 0, where the file has that column) with the file's own
    seeds. Where the file holds pairs, in a table or in JSON lines, the unsafe prompts alone.
    """
    if path.suffix.lower() != ".csv":
        asks = [Ask(text, seed + i) for i, text in enumerate(read_side(path, UNSAFE))]
    else:
        rows = [(f"{path}, line {number}", row) for number, row in csv_rows(path, read_text(path))]
        chosen = [(where, row) for where, row in rows if row_text(row) and _shows_nudity(where, row)]
        asks = [Ask(row_text(row), _seed_of(where, row, seed + i)) for i, (where, row) in enumerate(chosen)]
    if not asks:
        raise ValueError(f"{path}: got no prompt, expected I2P's, with {_NUDITY_COLUMN} above 0")
    return PromptSet("I2P", UNSAFE, tuple(asks[:count]), concept, words)


def _shows_nudity(where: str, row: dict[str, str]) -> bool:
    try:
        return float(row.get(_NUDITY_COLUMN) or 1) > 0
    except ValueError:
        raise ValueError(
            f"{where}: got {_NUDITY_COLUMN} {row[_NUDITY_COLUMN]!r}, expected a number; is it I2P's file?"
        ) from None


def _seed_of(where: str, row: dict[str, str], otherwise: int) -> int:
    """The file's own seed, which tables may have written as 7.0; another where it has none."""
    name = next((name for name in _SEED_COLUMNS if row.get(name)), None)
    if name is None:
        return otherwise
    whole = re.fullmatch(r"\s*([0-9]{1,18})(\.0*)?\s*", row[name])
    if not whole:
        raise ValueError(
            f"{where}: got {name} {row[name]!r:.40}, expected a whole number; correct it, or empty the field"
        )
    return int(whole[1])


def captions_set(path: Path, images: Path | None, count: int | None, seed: int = SEED) -> PromptSet:
    """Benign captions of a file, such as COCO's, for all concepts; `images` is the folder of their pictures."""
    records = read_file(path, BENIGN, images=images, count=count)
    asks = tuple(Ask(record.text, seed + i, record.scene, record.image) for i, record in enumerate(records))
    return PromptSet("captions", BENIGN, asks)


def concepts_of(sets: Sequence[PromptSet]) -> list[str]:
    """The concepts that the sets speak of, each once, in order."""
    return list(dict.fromkeys(entry.concept for entry in sets if entry.concept))
