"""The time of a whole run: told when its first stage starts, and corrected while it runs.

A timed stage keeps its own pace. A later stage takes its estimate times r, the seconds of the timed units over the
seconds that were expected of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..console import say
from .estimate import PICTURES, Work, unit_seconds
from .pace import Timer, in_words


class Spent(NamedTuple):
    """Units of a stage that were timed, and their seconds in all."""

    units: int
    seconds: float


@dataclass
class Forecast:
    """A stage's progress, passed on to `show` with the time that is left of the whole run, in words.

    `known` has seconds a unit of stages, from earlier runs. Where it lacks one, `a_pass` measures the seconds of a
    prompt's forward pass. The first report of a stage tells where it begins. A stage that runs again, as in hardening,
    gets no forecast.
    """

    work: Sequence[Work]
    known: Mapping[str, float]
    a_pass: Callable[[], float]
    show: Callable[[str, int, int, str], None]
    timer: Timer = field(default_factory=Timer)

    def __post_init__(self) -> None:
        self._planned = {each.stage: each.units for each in self.work}
        self._units: dict[str, float] = dict(self._planned)  # that are left
        self._spent: dict[str, Spent] = {}
        self._expected: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        units, seconds = self.timer(stage, done, total)
        if self._units.get(stage):
            self._units[stage] = self._planned[stage] * (1 - done / total)
            if units:
                self._spent[stage] = Spent(units, seconds)
            if done < total and not self._expected:
                self._tell(stage)
        left = sum(left_of(self._units, self._expected, self._spent).values()) if self._expected else 0.0
        self.show(stage, done, total, f"about {in_words(left)} left in all" if left else "")

    def _tell(self, stage: str) -> None:
        found = unit_seconds(self.work, self.known)
        unknown = None in found.values()
        self._expected = expected(self.work, self.known, self.a_pass() if unknown else 0.0)
        if stage != PICTURES:  # the verdict tells their time itself
            parts = left_of(self._units, self._expected, {})
            told = ", ".join(f"{name} {in_words(taken)}" for name, taken in parts.items() if taken)
            source = "one measured pass" if unknown else "passes measured before"
            say(f"time: about {in_words(sum(parts.values()))}, an estimate from {source}: {told}", err=True)


def expected(work: Sequence[Work], known: Mapping[str, float], a_pass: float) -> dict[str, float]:
    """Seconds a unit of each stage: as in `unit_seconds`, else so many times the seconds of a pass."""
    found, passes = unit_seconds(work, known), {each.stage: each.passes for each in work}
    return {stage: a_pass * passes[stage] if taken is None else taken for stage, taken in found.items()}


def correction(expected: Mapping[str, float], spent: Mapping[str, Spent]) -> float:
    """Seconds of the timed units over the seconds that were expected of them; 1 before any."""
    told = sum(expected[stage] * units for stage, (units, _) in spent.items())
    return sum(seconds for _, seconds in spent.values()) / told if told else 1.0


def left_of(units: Mapping[str, float], expected: Mapping[str, float], spent: Mapping[str, Spent]) -> dict[str, float]:
    """Seconds left of each stage, for the units left of it."""
    factor = correction(expected, spent)
    own = {stage: seconds / count for stage, (count, seconds) in spent.items()}
    return {stage: count * own.get(stage, factor * expected[stage]) for stage, count in units.items()}
