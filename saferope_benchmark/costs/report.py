"""The measured rows as Markdown and JSON, the curves as a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from saferope_core.concept.files import write_text
from saferope_training.flux.models import cpu_has_bf16
from saferope_training.plots import save

from .timing import Row

LABELS = {
    "resolution": "pixels of a side",
    "critical": "share of critical heads",
    "concepts": "concepts at once",
    "rank": "rank",
    "batch": "batch (512 x 512 at most)",
}
_DIGITS = {"x": 4, "ms": 1, "MB": 2, "s": 2}


def machine() -> str:
    """The processor and what runs on it, without a name or a path."""
    kind = torch.backends.cpu.get_cpu_capability()
    instructions = "has bf16 instructions" if cpu_has_bf16() else "has no bf16 instructions"
    threads = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU ({kind}, {instructions})"
    return f"{threads}, PyTorch {torch.__version__}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: measured value, spread, target and whether it was met."""
    lines = ["| what | measured | spread | target | met |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: Row) -> str:
    digits, unit = _DIGITS[row.unit], "" if row.unit == "x" else f" {row.unit}"
    what = f"{row.what} ({row.note})" if row.note and row.value is not None else row.what
    measured = row.note if row.value is None else f"{row.value:.{digits}f}{unit}"
    width = "" if row.spread is None else f"± {row.spread:.{digits}f}"
    target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}{unit}"
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return f"| {what} | {measured} | {width} | {target} | {met} |"


def curve_tables(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: a small table for each curve."""
    parts = []
    for axis, points in curves.items():
        values, times = zip(*points, strict=True)
        parts.append(f"| {LABELS[axis]} | {' | '.join(f'{value:g}' for value in values)} |")
        parts.append("|---" * (len(points) + 1) + "|")
        parts.append(f"| ms for q and k | {' | '.join(f'{each:.1f}' for each in times)} |\n")
    return "\n".join(parts)


def draw(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """One panel for each curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(curves), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel=LABELS[name], ylabel="ms for q and k", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    save(figure, path, dpi=100)


def write(out: Path, rows: Sequence[Row], curves: dict, setting: str) -> str:
    """bench.md, bench.json and, with curves, bench.png in `out`; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"Measured on {machine()}; {setting}.\n\n{table(rows)}"
    facts = {"machine": machine(), "setting": setting, "rows": [asdict(row) | {"met": row.met} for row in rows]}
    write_text(out / "bench.json", json.dumps(facts | {"curves": curves}, indent=2) + "\n")
    if curves:
        text += f"\n{curve_tables(curves)}"
        draw(out / "bench.png", curves)
    write_text(out / "bench.md", text)
    return text
