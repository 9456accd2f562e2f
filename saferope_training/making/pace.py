"""Times of work: measured while it runs, and kept beside the products, so that the next command can tell its time
before it starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from saferope_core.concept.files import write_text

from .. import processes
from ..flux.models import Model, Text, noise, velocity
from ..flux.pipelines import asked
from ..settings import Settings
from ..stages import Progress

FILE = "pace.json"
TIMED = ("extract", "latents", "train", "calibrate")  # stages; pictures that lie there already would take no time
# Settings beside the device that a time is measured with: others may take other times
_WITH = ("model", "quantise", "resolution", "passes_of", "checkpointing", "batch")


@dataclass
class Timer:
    """Units and seconds of each stage. The first report tells where it begins, and the second starts the clock:
    loading, and the first unit with its warm-up, are left out."""

    clock: Callable[[], float] = time.monotonic
    _began: dict[str, tuple[int, float] | None] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, total: int) -> tuple[int, float]:
        """Units, and the seconds that they took in all; (0, 0.0) before one was timed. A stage that is over is
        forgotten."""
        now, known = self.clock(), stage in self._began
        began = self._began.get(stage) or ((done, now) if known else None)
        self._began[stage] = began
        if done == total:
            del self._began[stage]
        return (done - began[0], now - began[1]) if began and done > began[0] else (0, 0.0)


@dataclass
class Pace:
    """A stage's progress, passed on to `show`; the seconds of its units go to `<out>/pace.json` when it ends."""

    out: Path
    about: dict[str, object]  # see `measured_with`
    show: Progress
    timer: Timer = field(default_factory=Timer)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.show(stage, done, total)
        units, seconds = self.timer(stage, done, total)
        if stage in TIMED and done == total and units and processes.is_main():
            taken = {"seconds": seconds / units, **self.about}
            write_text(self.out / FILE, json.dumps({**_read(self.out), stage: taken}, indent=2) + "\n")


@torch.no_grad()
def of_a_pass(model: Model, count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a forward pass of one prompt, `count` of them at once, after a pass to warm up. Encodes nothing."""
    config, row, length = model.transformer.config, asked(model), model.text_length
    states = torch.zeros(count, length, *row.states(config))
    text = Text(states, torch.ones(count, row.pooled_width(config, length)))
    latents = noise(model, count, torch.Generator().manual_seed(0))
    for _ in range(2):
        began = clock()
        velocity(model, latents, torch.ones(count), text).sum().item()  # the number waits for the GPU
    return (clock() - began) / count


def seconds_of(out: Path, settings: Settings, device: str) -> dict[str, float]:
    """Seconds a unit of each stage that was measured in the folder with this model, device and these passes."""
    now, found = measured_with(settings, device), {}
    for stage, taken in _read(out).items():
        seconds = taken.pop("seconds", None) if isinstance(taken, dict) else None
        if isinstance(seconds, float) and seconds > 0 and taken == now:
            found[stage] = seconds
    return found


def in_words(seconds: float) -> str:
    """Hours and minutes, rounded up; seconds below two minutes."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    minutes = -int(-seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def measured_with(settings: Settings, device: str) -> dict[str, object]:
    """The conditions of a measured time: the kind of device, the model, and the prompts of a pass."""
    return {"device": device.partition(":")[0], **{name: getattr(settings, name) for name in _WITH}}


def _read(out: Path) -> dict:
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut off: nothing was measured
        return {}
    return {stage: found[stage] for stage in TIMED if stage in found} if isinstance(found, dict) else {}
