"""Shows the progress of a long node: ComfyUI's bar, and the remaining time on the node."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.utils

from .notices import passing

EVERY = 2.0  # seconds from one text to the next
SURE = 0.03  # of the work. Before, models load, and the rest of the time is not known


class Countdown:
    """Call `step(count)` after each piece of the work, and `end()` after the last. `now` tells seconds."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.now = total, 0, now
        self.bar, self.start = comfy.utils.ProgressBar(total), now()
        self.told = self.start

    def step(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        at, share = self.now(), self.done / self.total
        if at - self.told >= EVERY and SURE <= share < 1:
            self.told = at
            passing(f"{100 * share:.0f} %, {left((at - self.start) * (1 / share - 1))} left")

    def end(self) -> None:
        """Takes the time back, where one was told."""
        if self.told != self.start:
            passing("done")


def left(seconds: float) -> str:
    """A time in words that do not promise too much."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    return "about a minute" if minutes == 1 else f"about {minutes} minutes"
