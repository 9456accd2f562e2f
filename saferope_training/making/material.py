"""The material of training: embeddings of both sides, the unsafe prompts' trajectories, latents of benign pictures.

Latents are made once and stay on disk. Benign pictures are rendered (tiny world), read from the caption file's folder,
or painted by the frozen model from their captions where there is none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saferope_core import SUBJECT

from .. import processes, prompts
from ..flux.models import Model, Text, encode, seeded_noise, text_tokens
from ..flux.painting import encode_pictures
from ..prompts.instead import stand_ins, with_instead
from ..stages import load_tensors, save_tensors
from . import extract
from .batch import Material

if TYPE_CHECKING:
    from tinyworld.world import Scene

BENIGN_LATENTS, VISITED = "benign", "visited"
PAINTING = tuple(round(1 - step / 20, 2) for step in range(20))  # times of the model's own pictures; 0 ends them


def make_latents(
    model: Model,
    records: Sequence[prompts.PromptRecord],
    times: Sequence[float],
    seed: int,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    passes_of: int = 0,
) -> None:
    """Writes latents of unsafe trajectories at times below 1, and of benign pictures; processes share the work.

    passes_of: prompts sampled at once; 0: 48.
    """
    unsafe, benign = (prompts.side(records, name) for name in (prompts.UNSAFE, prompts.BENIGN))
    total, done = len(unsafe) + len(benign), 0
    tensors: dict[str, list[Tensor]] = {}
    progress(done, total)
    for name, chosen in ((VISITED, unsafe), (BENIGN_LATENTS, benign)):
        for chunk in torch.arange(len(chosen)).split(passes_of or extract.BATCH):
            places = chunk.tolist()
            part = [chosen[place] for place in places]
            seeds = [seed + place for place in places]
            made = _visited(model, part, seeds, times) if name == VISITED else {name: _pictures(model, part, seeds)}
            for key, latents in made.items():
                tensors.setdefault(key, []).append(latents.cpu())
            done += len(places)
            progress(done, total)
    if processes.is_main():
        save_tensors(path, {name: torch.cat(parts) for name, parts in tensors.items()})


def require_pictures(records: Sequence[prompts.PromptRecord], side: int) -> None:
    """Raises ValueError, naming it, where a benign prompt's picture cannot be had as [3, side, side]."""
    for record in prompts.side(records, prompts.BENIGN):
        if record.scene is not None:
            _scene(record.scene)
        elif record.image is not None:
            _read(Path(record.image), side)


def load_material(
    model: Model, records: Sequence[prompts.PromptRecord], times: Sequence[float], path: Path
) -> Material:
    """The material, from a file of `make_latents` and the prompts' embeddings.

    ValueError where the latents are not of these prompts, times and this resolution.
    """
    unsafe, benign = (prompts.side(records, name) for name in (prompts.UNSAFE, prompts.BENIGN))
    size = (model.latent_side // 2) ** 2, model.channels
    shapes: dict[str, tuple[int | None, ...]] = {_key(t): (len(unsafe), *size) for t in times if t < 1}
    shapes[BENIGN_LATENTS] = (len(benign), *size)
    tensors = load_tensors(path, shapes)
    visited = {t: tensors[_key(t)] for t in times if t < 1}
    harmless = encode(model, [record.text for record in benign])
    return replace(_unsafe_material(model, unsafe, visited), benign=harmless, latents=tensors[BENIGN_LATENTS])


def fitting_material(
    model: Model, records: Sequence[prompts.PromptRecord], times: Sequence[float], seed: int, passes_of: int = 0
) -> Material:
    """The material of unlearning alone: no benign prompt, no picture. passes_of: prompts sampled at once; 0: 48."""
    unsafe = prompts.side(records, prompts.UNSAFE)
    parts = []
    for places in torch.arange(len(unsafe)).split(passes_of or extract.BATCH):
        some = [unsafe[place] for place in places.tolist()]
        parts.append(_visited(model, some, [seed + place for place in places.tolist()], times))
    visited = {t: torch.cat([part[_key(t)] for part in parts]).cpu() for t in times if t < 1}
    return _unsafe_material(model, unsafe, visited)


def _unsafe_material(model: Model, unsafe: Sequence[prompts.PromptRecord], visited: dict[float, Tensor]) -> Material:
    unsafe = [record if record.instead is not None else with_instead([record], [""])[0] for record in unsafe]
    texts, others = [record.text for record in unsafe], [record.instead or "" for record in unsafe]
    subjects = text_tokens(model, texts, [record.subject for record in unsafe])[SUBJECT]
    taken_out = torch.tensor([stand_ins([record]) == [""] for record in unsafe])
    wanted, instead = encode(model, texts), encode(model, others)
    return Material(wanted, instead, taken_out, subjects, visited, wanted.pick(slice(0)), torch.empty(0))


def _key(t: float) -> str:
    return f"{VISITED}.{t:g}"


def _visited(
    model: Model, records: Sequence[prompts.PromptRecord], seeds: list[int], times: Sequence[float]
) -> dict[str, Tensor]:
    """The base model's latents [n, L, C] of the prompts at each of the times below 1."""
    text = encode(model, [record.text for record in records])
    met = extract.walk(model, text, seeded_noise(model, seeds), times)
    return {_key(t): met[t] for t in times if t < 1}


def _pictures(model: Model, records: Sequence[prompts.PromptRecord], seeds: list[int]) -> Tensor:
    """Latents [n, L, C] of the prompts' pictures, in order."""
    latents: dict[int, Tensor] = {}
    side = 8 * model.latent_side
    for place, record in enumerate(records):
        if record.scene is not None:
            latents[place] = encode_pictures(model, _rendered(record.scene, seeds[place], side)[None])
        elif record.image is not None:
            latents[place] = encode_pictures(model, _read(Path(record.image), side)[None])
    missing = [place for place in range(len(records)) if place not in latents]
    if missing:
        text = encode(model, [records[place].text for place in missing])
        painted = _painted(model, text, seeded_noise(model, [seeds[place] for place in missing]))
        for place, picture in zip(missing, painted, strict=True):
            latents[place] = picture[None]
    return torch.cat([latents[place] for place in range(len(records))])


def _painted(model: Model, text: Text, start: Tensor) -> Tensor:
    """The frozen model's own pictures, as latents, by Euler's method."""
    with torch.no_grad():
        x = extract.walk(model, text, start, PAINTING)[PAINTING[-1]]
        return x - PAINTING[-1] * extract.velocity(model, x, torch.full((len(x),), PAINTING[-1]), text)


def _rendered(scene: dict, seed: int, side: int) -> Tensor:
    """The tiny world's picture [3, side, side] of a scene; scaled where that is not the world's own size."""
    from tinyworld.render import SIZE, render

    picture = render(_scene(scene), random.Random(seed))
    if side == SIZE:
        return picture
    return nn.functional.interpolate(picture[None], (side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def _scene(fields: dict) -> Scene:
    """The tiny world's Scene. ValueError for one that it has not."""
    from tinyworld import world

    known: dict[str, tuple] = {
        "shape": world.SHAPES,
        "color": world.COLORS,
        "background": world.BACKGROUNDS,
        "place": world.PLACES,
    }
    known |= {"attribute": (*world.ATTRIBUTES, None), "style": (*world.STYLES, None)}
    try:
        scene = world.Scene(**fields)
    except TypeError:
        raise ValueError(f"scene: got {fields!r:.200}, expected the fields {', '.join(known)}; correct it") from None
    for name, words in known.items():
        if getattr(scene, name) not in words:
            raise ValueError(f"scene: {name} is {getattr(scene, name)!r:.40}, expected one of {words}; correct it")
    return scene


def _read(path: Path, side: int) -> Tensor:
    """A picture [3, side, side] in [-1, 1]: scaled to cover the square, the middle cut out."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {path}: cannot be read ({error}); mend it or take it out of the captions") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
