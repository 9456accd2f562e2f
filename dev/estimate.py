"""The time that the demo needs on this machine, told from a few passes of its model.

The demo does three things: it trains a concept file, starts a ComfyUI, and draws pictures there. Each takes about the
same number of passes on every machine, and a pass takes seconds to measure.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from statistics import median
from typing import NamedTuple

import torch

BATCH = 24  # prompts of a pass in training; the default of `saferope train`
# Each part in passes of its kind: seconds of a `make demo` over seconds of a pass, on two cores with AVX-512 and bf16
TRAINING_PASSES = 930  # 58 s, imports included, over 0.0625 s
STARTING_PASSES = 900  # of ComfyUI: 9.5 s over 0.0102 s
PICTURE_PASSES = 29  # 16 steps, the VAE and the way through HTTP: 0.294 s over 0.0102 s
TRIES = 5


class Passes(NamedTuple):
    """Seconds of one pass of the tiny world: of a training's batch, and of one picture as ComfyUI computes it."""

    batch: float
    picture: float


def measure_passes() -> Passes:
    """Both passes timed, the median of TRIES after one to warm up."""
    with redirect_stderr(io.StringIO()), torch.no_grad():  # libraries tell of kernels that this machine does not have
        from saferope_training.flux.loading import load_model
        from saferope_training.flux.models import encode, noise, velocity

        model, generator = load_model("tinyworld"), torch.Generator().manual_seed(0)

        def seconds(count: int, autocast: bool) -> float:
            text, latents = encode(model, ["a red star"] * count), noise(model, count, generator)
            return _median_seconds(lambda: velocity(model, latents, torch.ones(count), text, autocast))

        return Passes(seconds(BATCH, autocast=True), seconds(1, autocast=False))


def demo_seconds(passes: Passes, pictures: int, trained: bool) -> float:
    """Seconds of a demo that still has to draw so many pictures, and to train unless that is done."""
    drawing = STARTING_PASSES + PICTURE_PASSES * pictures if pictures else 0
    return drawing * passes.picture + (0 if trained else TRAINING_PASSES * passes.batch)


def in_words(seconds: float) -> str:
    """Whole minutes from a minute and a half on, tens of seconds below."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(10, round(seconds, -1)):.0f} seconds"


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
