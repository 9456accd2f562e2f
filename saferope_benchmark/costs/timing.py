"""Timings of several forms of the same work, in turns, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Row:
    """One line of the report. `value` None: not measured, `note` says why. `spread` is half the range between
    quartiles.
    """

    what: str
    value: float | None
    unit: str  # "x", "ms", "MB", "s"
    target: float | None = None
    at_least: bool = False  # the target is a lower bound
    spread: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured or asked for."""
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def in_turns(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each form, `repeats` of them, after one that is not counted; round by round, all forms in each. A
    form has ended when the GPU has, where there is one.
    """
    for form in forms.values():
        form()
    wait()
    taken = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            wait()
            taken[name].append(time.perf_counter() - start)
    return taken


def wait() -> None:
    """Waits until the GPU has done all its work; returns at once where no GPU was used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: list[float]) -> float:
    """Half the range between the quartiles."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return (high - low).item() / 2


def ratio(above: list[float], below: list[float], plus: float = 0.0) -> tuple[float, float]:
    """Median and spread of above / below, pair by pair, plus a number."""
    ratios = [plus + a / b for a, b in zip(above, below, strict=True)]
    return median(ratios), spread(ratios)
