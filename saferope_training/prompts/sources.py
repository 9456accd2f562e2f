"""Where a concept's prompts come from: files, the tiny world, or a preset's products."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

from saferope_core import presets, sha256

from ..flux.folder import paints_tiny_world
from ..flux.models import TINYWORLD
from ..settings import Settings
from . import BENIGN, UNSAFE, PromptRecord, tiny_world_prompts
from .instead import with_instead
from .product import product_prompts
from .readers import read_file
from .similarity import filtered

_BENIGN_SEED = 1_000_003  # the two sides draw from seeds of their own


def prompts_for(settings: Settings) -> list[PromptRecord]:
    """Unsafe prompts, then benign ones, as many as the settings ask for; the same for the same settings.

    A side whose file is named comes from it. ValueError where a side has no source, or too few prompts.
    """
    if settings.unsafe is None and settings.benign is None and _tiny(settings):
        records = tiny_world_prompts(settings.concept, settings.unsafe_prompts, settings.benign_prompts, settings.seed)
    else:
        records = _unsafe(settings) + _benign(settings)
    return with_instead(records, itertools.cycle(settings.instead)) if settings.instead else records


def _tiny(settings: Settings) -> bool:
    """Whether the tiny world is to ask: for the embedded model, and for its concepts in a folder with its pictures."""
    from tinyworld.world import CONCEPTS

    return settings.model == TINYWORLD or (settings.concept in CONCEPTS and paints_tiny_world(Path(settings.model)))


def origins(settings: Settings) -> dict[str, str]:
    """sha256 by name of all that `prompts_for` reads beside settings and files of prompts; {} for the tiny world's own.

    These are presets, which another version of this package may have changed, and a local folder of a sentence encoder.
    A hub id counts by its name.
    """
    files = (settings.unsafe, settings.benign)
    if files == (None, None) and _tiny(settings):
        return {}
    known = (*presets.names(), presets.BENIGN)
    names = [name for name, file in zip((settings.concept, presets.BENIGN), files, strict=True) if file is None]
    found = {name: json.dumps(presets.load(name), sort_keys=True) for name in names if name in known}
    encoder = Path(settings.similarity_model or "")
    if settings.similarity_model and settings.unsafe is None and encoder.is_dir():
        paths = sorted(path for path in encoder.rglob("*") if path.is_file())
        found["similarity_model"] = ";".join(f"{path.relative_to(encoder)}={sha256(path)}" for path in paths)
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in found.items()}


def _unsafe(settings: Settings) -> list[PromptRecord]:
    if settings.unsafe is not None:
        records = read_file(
            Path(settings.unsafe),
            UNSAFE,
            settings.subjects,
            count=settings.unsafe_prompts,
            seed=settings.seed,
            category=settings.category,
        )
        return [record if record.instead is not None else with_instead([record], [""])[0] for record in records]
    if settings.concept not in presets.names():
        raise ValueError(
            f"concept {settings.concept!r}: got no prompts for it, expected a file (--unsafe) or one of the presets "
            f"{', '.join(presets.names())}"
        )
    records = _product(settings, settings.concept, UNSAFE, settings.unsafe_prompts, settings.seed)
    preset = presets.load(settings.concept)
    words = dict(zip(preset["subjects"], preset["instead"], strict=True))
    return with_instead(records, (words[record.text[slice(*record.subject or ())]] for record in records))


def _benign(settings: Settings) -> list[PromptRecord]:
    if settings.benign is not None:
        images = Path(settings.images) if settings.images else None
        seed = settings.seed + _BENIGN_SEED
        pairs = settings.category if settings.benign == settings.unsafe else None
        return read_file(Path(settings.benign), BENIGN, (), images, settings.benign_prompts, seed, pairs)
    return _product(settings, presets.BENIGN, BENIGN, settings.benign_prompts, settings.seed + _BENIGN_SEED)


def _product(settings: Settings, name: str, side: str, count: int, seed: int) -> list[PromptRecord]:
    preset = presets.load(name)
    subjects = preset["subjects"]
    if settings.similarity_model is not None and side == UNSAFE:
        subjects = filtered(subjects, preset["seeds"], settings.similarity, settings.similarity_model)
    return product_prompts(side, subjects, preset["modifiers"], preset["templates"], count, seed)
