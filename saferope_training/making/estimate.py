"""The cost of a command, counted before anything starts: memory of both kinds, disk, and time from measured passes.

Loads, fetches and writes nothing. A model's sizes are read from its files; FLUX.1-dev's and -schnell's are known.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from saferope_core import COLLECTED, ROLES, schedule
from saferope_core.measure.statistics import SAMPLED

from ..flux import loading
from ..flux.attach import geometry_from
from ..flux.folder import INDEX
from ..flux.models import TINYWORLD
from ..flux.pipelines import asked_of
from ..prompts import BENIGN, UNSAFE, PromptRecord, side
from ..settings import CALIBRATE, EXTRACT, LATENTS, TRAIN, Settings
from . import memory, pace, preview
from .heads import for_family, ranks_of
from .material import PAINTING

KNOWN = {"black-forest-labs/FLUX.1-dev": True, "black-forest-labs/FLUX.1-schnell": False}  # embeds guidance
# Bytes of their files: T5-XXL's encoder and CLIP-L in bf16, the VAE, the transformer; and of T5's embedding, in bf16
ENCODERS, VAE, TRANSFORMER, LAYER = 9_770_000_000, 170_000_000, 23_800_000_000, 2 * 32128 * 4096
PROGRAM = 3 * 2**30  # RAM of Python, torch and diffusers, with the driver's: 0.8 GiB without a GPU, the rest a guess
_LEARNT = 4  # passes' time of a prompt in training: its target, its own, and two backward
_WIDEST_PREVIEW = 160  # pixels of a side at least, see making/preview.py
UNKNOWN = "not known before a measured pass"
PICTURES = "pictures"  # as `evaluate` reports them: the verdict's, behind a file that is made


class Shape(NamedTuple):
    """A transformer's configuration, its outline, and bytes to download."""

    config: dict
    sizes: loading.Outline
    download: int = 0


class Work(NamedTuple):
    """A stage of `units`, each worth `passes` forward passes of a prompt."""

    stage: str
    units: int
    passes: float


@dataclass(frozen=True)
class Task:
    """The work on these prompts: `goal` is the last stage, `pictures` is the number of a verdict's pictures."""

    settings: Settings
    records: Sequence[PromptRecord]
    goal: str
    every: int = 0  # steps from preview to preview
    pictures: int = 0


def shape_of(settings: Settings) -> Shape:
    """The model's shape, from its files or known by its name. ValueError for a model that is not here, nor known."""
    from huggingface_hub import try_to_load_from_cache

    here: list[str | None] = []
    for name in (settings.model, settings.encoders):
        if name is not None and name != TINYWORLD and not loading.is_here(name):
            index = try_to_load_from_cache(name, INDEX)
            if not isinstance(index, str) or not [*Path(index).parent.glob("text_encoder*/*.safetensors")]:
                return _known(settings, name)
            name = str(Path(index).parent)
        here.append(name)
    model, encoders = str(here[0]), here[1]
    config = loading.config_of(model, encoders)
    return Shape(config, loading.outline(model, encoders, settings.resolution, config))


def _known(settings: Settings, name: str) -> Shape:
    from diffusers import FluxTransformer2DModel

    if name not in KNOWN or name != settings.model:
        raise ValueError(f"model {name!r}: got no such model here yet, so its sizes are not known; fetch it first")
    with torch.device("meta"):  # its other defaults are FLUX.1-dev's
        config = dict(FluxTransformer2DModel(guidance_embeds=KNOWN[name]).config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    text = (loading.DEV if KNOWN[name] else loading.SCHNELL).text_length
    side = (settings.resolution or loading.RESOLUTION) // memory._PATCH
    return Shape(config, loading.Outline(text, side, ENCODERS, LAYER, VAE), TRANSFORMER + ENCODERS + VAE)


def work_of(task: Task) -> list[Work]:
    """The stages of a task in their order; stages without a measure of time are left out."""
    s, unsafe, benign = task.settings, side(task.records, UNSAFE), side(task.records, BENIGN)
    count, visits = len(task.records), len(schedule(s.unlearn_at)) - 1
    learnt = s.batch * (_LEARNT + s.checkpointing)
    found = [Work(EXTRACT, count, len(schedule(s.timesteps)))] if task.goal else []
    if task.goal == TRAIN:
        painted = sum(record.scene is None and record.image is None for record in benign)
        passes = visits * len(unsafe) + len(PAINTING) * painted
        looks = s.steps // task.every if task.every else 0
        found += [Work(LATENTS, count, passes / max(1, count))]
        found += [Work(TRAIN, s.steps, learnt + preview.PASSES * looks / s.steps)]
    if task.goal == CALIBRATE and s.fits:
        found += [Work(CALIBRATE, s.fit, learnt + visits * len(unsafe) / s.fit)]
    return found + ([Work(PICTURES, task.pictures, steps_of(s))] if task.pictures else [])


def steps_of(settings: Settings) -> int:
    """Sampling steps of a picture: the tiny world's, or FLUX.1-dev's for all other models."""
    from tinyworld.model import STEPS

    return STEPS if settings.model == TINYWORLD else loading.DEV.steps


def unit_seconds(work: Sequence[Work], known: Mapping[str, float]) -> dict[str, float | None]:
    """Seconds a unit of each stage: its own time, else from another stage's time a pass; None: none is known."""
    passes = [known[each.stage] / each.passes for each in work if each.stage in known and each.passes]
    derived = {each.stage: passes[0] * each.passes if passes else None for each in work}
    return {stage: known.get(stage, taken) for stage, taken in derived.items()}


def seconds(work: Sequence[Work], known: Mapping[str, float]) -> dict[str, float | None]:
    """Seconds of each stage; None: not known."""
    units = {each.stage: each.units for each in work}
    found = unit_seconds(work, known)
    return {stage: None if each is None else each * units[stage] for stage, each in found.items()}


def disk_of(task: Task, shape: Shape) -> dict[str, int]:
    """Bytes of each product; samples are taken to be full, and pictures not to be compressed."""
    s, text, tokens = task.settings, shape.sizes.text, shape.sizes.side
    geometry = geometry_from(shape.config)
    row = asked_of(geometry.family)
    heads, width = geometry.blocks * geometry.heads, geometry.head_dim
    found = {}
    if s.model != TINYWORLD:
        texts = {record.text for record in task.records} | {record.instead or "" for record in task.records}
        each = text * math.prod(row.states(shape.config)) + row.pooled_width(shape.config, text)
        found["embeddings"] = 4 * each * (len(texts) + 2 * preview.EACH * bool(task.every) + task.pictures // 2)
    if task.goal:
        found["statistics"] = statistics_bytes(s.reservoir, heads, width)
    ranks = ranks_of(for_family(s, geometry.family))
    dimensions = ranks.risk + ranks.outside
    bases, turns = 2 * len(ROLES) * heads * width * dimensions, 2 * heads * dimensions**2
    if task.goal in (TRAIN, CALIBRATE):
        found["heads and concept file"] = (4 + 2) * bases + 2 * turns
    if task.goal == TRAIN:
        vectors = len(side(task.records, UNSAFE)) * (len(s.unlearn_at) - 1) + len(side(task.records, BENIGN))
        found["latents"] = 4 * vectors * tokens**2 * row.channels(shape.config)
        looks = s.steps // task.every if task.every else 0
        across = max(_WIDEST_PREVIEW, tokens * memory._PATCH)
        found["training's state, best state and previews"] = (12 + 4) * turns + looks * 4 * preview.EACH * 3 * across**2
    if task.pictures:
        found["pictures"] = task.pictures * 3 * (tokens * memory._PATCH) ** 2
    return found


def statistics_bytes(capacity: int, heads: int, width: int) -> int:
    """Bytes of the sums in fp64 and the samples in bf16."""
    return len(ROLES) * heads * width * (8 * width * (len(COLLECTED) + 1) + 2 * capacity * len(SAMPLED))


def ram_of(task: Task, shape: Shape, plan: memory.Plan, device: str) -> int:
    """Peak bytes of this machine's memory.

    With a GPU: the largest of the loaded weights, the encoders, and the statistics, which are there twice while they
    are put together. Without: the plan itself and the statistics.
    """
    listened = 2 * disk_of(task, shape).get("statistics", 0)
    if torch.device(device).type == "cpu":
        return plan.peak + listened + PROGRAM
    file = Path(task.settings.model)
    whole = file.stat().st_size if file.is_file() else memory.transformer_bytes(shape.config, None, torch.bfloat16)
    return max(whole, shape.sizes.encoders, listened) + PROGRAM


def free_of(out: Path) -> tuple[int, int]:
    """Free bytes: RAM, and the disk that `out` is or will be on."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return psutil.virtual_memory().available, shutil.disk_usage(place).free


def time_lines(work: Sequence[Work], out: Path, settings: Settings, device: str) -> list[str]:
    """A line a stage, and the sum, all marked as estimates."""
    found = seconds(work, pace.seconds_of(out, settings, device))
    told = {name: f"{pace.in_words(taken)}, an estimate" if taken else UNKNOWN for name, taken in found.items()}
    known = [taken for taken in found.values() if taken is not None]
    if known and len(known) == len(found):
        told["in all"] = f"{pace.in_words(sum(known))}, an estimate from passes measured in {out}"
    return [f"{stage}: {words}" for stage, words in told.items()]
