"""What a concept file does to a model: the same prompts and seeds without and with protection, read by the detector."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from saferope_core import Protection, load_concepts, sha256

from .attach import attached
from .metrics import mcnemar, pixel_difference, rate, wilson_interval
from .models import TINYWORLD, Model
from .pictures import comparison_grid

UNSAFE, HELD_OUT, NEIGHBOURS, BENIGN = "unsafe", "held-out words", "neighbours", "benign"
SEED = 90_001  # far from the seeds people train with
GREY_LEVELS = "of 255"
_SHOWN = 10  # pictures per row of the comparison


@dataclass(frozen=True)
class Sizes:
    """How many pictures of each kind; every one is made twice."""

    unsafe: int = 64
    held_out: int = 64
    neighbours: int = 64
    benign: int = 128


@dataclass(frozen=True)
class Row:
    """One measure, in [0, 1] unless `unit` names another.

    Intervals are Wilson's at 95 %, and p is McNemar's, where the measure counts pictures.
    """

    measure: str
    count: int
    unprotected: float
    protected: float
    unprotected_interval: tuple[float, float] | None = None
    protected_interval: tuple[float, float] | None = None
    p_value: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Report:
    """The table of one concept and what it was measured on; `shown` are rows of pictures."""

    concept: str
    file_sha256: str
    model: str
    strength: float
    seed: int
    rows: list[Row]
    shown: list[tuple[str, Tensor]]


class Shots:
    """Pictures of some prompts, [n, 3, h, w] in [-1, 1], without and with protection, and the seconds each set took."""

    def __init__(self, model: Model, prompts, seed: int, protection: Protection, tell: Callable) -> None:
        from tinyworld.model import generate

        self.prompts, self.pictures, self.seconds = prompts, [], []
        texts, seeds = [prompt.text for prompt in prompts], range(seed, seed + len(prompts))
        for context in (nullcontext(), attached(model.transformer, protection.rotate)):
            start = time.perf_counter()
            with context:
                self.pictures.append(generate(model.pipe, texts, seeds, progress=tell))
            self.seconds.append(time.perf_counter() - start)


def evaluate(
    model: Model,
    path: Path,
    strength: float = 1.0,
    sizes: Sizes = Sizes(),
    seed: int = SEED,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Report]:
    """One report per concept of the file, all of the file's concepts applied together.

    Prompts are combinations that neither the model nor the concept was trained on. ValueError where the model is not the
    tiny world, whose detector reads the pictures.
    """
    if model.name != TINYWORLD:
        raise ValueError(f"evaluation: got model {model.name!r}, expected {TINYWORLD!r}: only it has a detector so far")
    concepts = load_concepts(path)
    protection = Protection(concepts, model.geometry, strengths=[strength] * len(concepts))
    reports = []
    for concept in concepts:
        shots = _shoot(model, concept.slug, protection, sizes, seed, progress)
        rows, shown = _rows(concept.slug, shots), _shown(shots)
        reports.append(Report(concept.slug, sha256(path), model.name, strength, seed, rows, shown))
    return reports


def write_reports(out: Path, reports: list[Report]) -> None:
    """Writes `<slug>.evaluation.json`, `.csv`, `.md` and `.png` for every report."""
    out.mkdir(parents=True, exist_ok=True)
    for report in reports:
        stem = f"{report.concept}.evaluation"
        facts = {name: value for name, value in vars(report).items() if name not in ("rows", "shown")}
        facts["rows"] = [asdict(row) for row in report.rows]
        (out / f"{stem}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (out / f"{stem}.md").write_text(markdown(report), encoding="utf-8")
        with (out / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(facts["rows"][0]))
            writer.writeheader()
            writer.writerows(facts["rows"])
        comparison_grid(out / f"{stem}.png", report.shown)


def markdown(report: Report) -> str:
    """The report as a Markdown table."""
    lines = ["| measure | n | unprotected | protected | p |", "|---|---|---|---|---|"]
    for row in report.rows:
        sides = [
            _shown_number(row.unprotected, row.unprotected_interval, row.unit),
            _shown_number(row.protected, row.protected_interval, row.unit),
        ]
        p = "" if row.p_value is None else f"{row.p_value:.2g}"
        lines.append(f"| {row.measure} | {row.count} | {sides[0]} | {sides[1]} | {p} |")
    facts = f"concept `{report.concept}`, model {report.model}, strength {report.strength:g}, seed {report.seed}"
    return f"{facts}, file sha256 {report.file_sha256[:12]}\n\n" + "\n".join(lines) + "\n"


def _shoot(model, slug, protection, sizes: Sizes, seed: int, progress) -> dict[str, Shots]:
    from tinyworld import world

    asked = {
        UNSAFE: world.unsafe_prompts(slug, sizes.unsafe, seed, test=True),
        HELD_OUT: world.unsafe_prompts(slug, sizes.held_out, seed, held_out=True, test=True),
        NEIGHBOURS: world.neighbour_prompts(slug, sizes.neighbours, seed, test=True),
        BENIGN: world.benign_prompts(slug, sizes.benign, seed, test=True),
    }
    total, done = 2 * sum(len(prompts) for prompts in asked.values()), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress("pictures", done, total)

    return {name: Shots(model, prompts, seed, protection, tell) for name, prompts in asked.items() if prompts}


def _rows(slug: str, shots: dict[str, Shots]) -> list[Row]:
    from tinyworld import detector, world

    reader = detector.load_detector()
    rows = []
    for name in (UNSAFE, HELD_OUT):
        if name in shots:
            hits = [detector.shows(reader, pictures, slug) for pictures in shots[name].pictures]
            rows.append(_counted(f"{slug} shown, {name}", *hits))
    for name in (NEIGHBOURS, BENIGN):
        if name in shots:
            rows += _kept(name, shots[name], reader, world.CONCEPTS[slug].field if name == NEIGHBOURS else None)
    seconds = [sum(shot.seconds[side] for shot in shots.values()) for side in (0, 1)]
    count = sum(len(shot.prompts) for shot in shots.values())
    return [*rows, Row("time per picture", count, *(spent / count for spent in seconds), unit="s")]


def _kept(name: str, shots: Shots, reader, only: str | None) -> list[Row]:
    """How much of what was asked for is still there: per attribute (or the one that matters), on average, in pixels."""
    from tinyworld import detector

    scenes, count = [prompt.scene for prompt in shots.prompts], len(shots.prompts)
    before, after = (detector.accuracy(reader, pictures, scenes) for pictures in shots.pictures)
    chosen = [only] if only else list(before)
    rows = [Row(f"{field} right, {name}", count, before[field], after[field]) for field in chosen]
    if not only:
        means = [sum(side.values()) / len(side) for side in (before, after)]
        rows.append(Row(f"all attributes right, {name}", count, *means))
    return [*rows, Row(f"mean difference, {name}", count, 0.0, pixel_difference(*shots.pictures), unit=GREY_LEVELS)]


def _counted(measure: str, before: Tensor, after: Tensor) -> Row:
    intervals = (wilson_interval(int(hits.sum()), len(hits)) for hits in (before, after))
    return Row(measure, len(before), rate(before), rate(after), *intervals, mcnemar(before, after))


def _shown(shots: dict[str, Shots]) -> list[tuple[str, Tensor]]:
    sides = ("unprotected", "protected")
    return [
        (f"{name},\n{side}", pictures[:_SHOWN].clone())
        for name, shot in shots.items()
        for side, pictures in zip(sides, shot.pictures, strict=True)
    ]


def _shown_number(value: float, interval: tuple[float, float] | None, unit: str) -> str:
    if unit:
        return f"{value:.3f} {unit}"
    between = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * value:.1f} %{between}"
