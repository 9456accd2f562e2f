"""The time that the demo needs on this machine, told from a few passes of its model.

The demo does three things: it trains a concept file, starts a ComfyUI, and draws pictures there. Each takes about the same
number of passes on every machine, and a pass takes seconds to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

BATCH = 24  # prompts of a pass in training; the default of `saferope train`
# What each part takes, in passes of its kind. Measured on two cores of an AMD EPYC (AVX-512): see `python -m dev.demo`.
TRAINING_PASSES = 900
STARTING_PASSES = 300
PICTURE_PASSES = 30
TRIES = 5


class Passes(NamedTuple):
    """Seconds of one pass of the tiny world: of a training's batch, and of one picture as ComfyUI computes it."""

    batch: float
    picture: float


def measure_passes() -> Passes:
    """Both passes timed, the median of TRIES after one to warm up."""
    from training.flux.loading import load_model
    from training.flux.models import encode, noise, velocity

    model, generator = load_model("tinyworld"), torch.Generator().manual_seed(0)

    def seconds(count: int, autocast: bool) -> float:
        text, latents = encode(model, ["a red star"] * count), noise(model, count, generator)
        return _median_seconds(lambda: velocity(model, latents, torch.ones(count), text, autocast))

    with torch.no_grad():
        return Passes(seconds(BATCH, autocast=True), seconds(1, autocast=False))


def demo_seconds(passes: Passes, pictures: int, trained: bool) -> float:
    """Seconds of a demo that still has to draw so many pictures, and to train unless that is done."""
    drawing = STARTING_PASSES + PICTURE_PASSES * pictures if pictures else 0
    return drawing * passes.picture + (0 if trained else TRAINING_PASSES * passes.batch)


def in_words(seconds: float) -> str:
    """About how long: whole minutes above two, else tens of seconds."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{max(10, round(seconds, -1)):.0f} seconds"


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
