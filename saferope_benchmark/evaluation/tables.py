"""From scores to tables: rows with their statistics, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from saferope_core.concept.files import write_text
from saferope_core.concept.untrusted import markdown as words

from ..prompt_sets import PromptSet
from ..scores import Absent, Measure
from ..scores.metrics import mcnemar, mean_interval, rate, wilson_interval
from .methods import UNPROTECTED, Method

SECONDS, RATIO, MEBIBYTES = "s", "x", "MiB"
COSTS = (SECONDS, RATIO, MEBIBYTES)  # units of measures that differ in every run
_CENTS = 100


@dataclass(frozen=True)
class Row:
    """One measure of a method on a set, beside the unprotected model's of the same prompts and seeds.

    Values are shares in [0, 1] unless `unit` names another. Where pictures are counted, intervals at 95 % are Wilson's,
    and p is McNemar's, exact and two-sided. Where a distance is averaged, intervals are Student's. `column` is the
    summary's column that shows the row.
    """

    concept: str
    method: str
    strength: float | None
    set: str
    measure: str
    count: int
    value: float
    unprotected: float
    interval: tuple[float, float] | None = None
    unprotected_interval: tuple[float, float] | None = None
    p_value: float | None = None
    unit: str = ""
    column: str = ""


def row(method: Method, asked: PromptSet, name: str, own: Measure, base: Measure) -> Row:
    """The row of a measure."""
    counted = own.values.dtype == torch.bool
    intervals = [_interval(measure) for measure in (own, base)]
    means = [rate(m.values) if counted else m.values.double().mean().item() for m in (own, base)]
    p = mcnemar(base.values, own.values) if counted and method.name != UNPROTECTED else None
    concept = asked.concept or method.concept
    head = (concept, method.name, method.strength, asked.name, name, len(asked.asks))
    return Row(*head, *means, *intervals, p, own.unit, own.column)


def _interval(measure: Measure) -> tuple[float, float] | None:
    """The interval of counted pictures, or of distances, picture by picture."""
    values = measure.values
    if values.dtype == torch.bool:
        return wilson_interval(int(values.sum()), values.numel())
    return mean_interval(values) if measure.unit and values.ndim == 1 and len(values) > 1 else None


def cost_rows(method: Method, concept: str, own: Sequence[dict], base: Sequence[dict], count: int) -> list[Row]:
    """Seconds a picture and peak memory, and both as multiples of the unprotected model's in the same run."""
    head = (concept, method.name, method.strength, "")
    seconds = [sum(cost["seconds"] for cost in side) / count for side in (own, base)]
    rows = [Row(*head, "time per picture", count, *seconds, unit=SECONDS)]
    rows.append(Row(*head, "time", count, seconds[0] / seconds[1], 1.0, unit=RATIO, column="time"))
    if all("peak_bytes" in cost for cost in (*own, *base)):
        peaks = [max(cost["peak_bytes"] for cost in side) / 2**20 for side in (own, base)]
        rows.append(Row(*head, "peak memory", count, *peaks, unit=MEBIBYTES))
        rows.append(Row(*head, "memory", count, peaks[0] / peaks[1], 1.0, unit=RATIO, column="memory"))
    return rows


def number(value: float, interval: tuple[float, float] | None = None, unit: str = "") -> str:
    """As people read it: `98.4 % (91.7 to 99.7)`, `0.413 of 255 (0.392 to 0.434)`."""
    if unit == RATIO:
        return f"{value:.2f} x"
    if unit:
        return f"{value:.3f} {unit}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
    between = f" ({_CENTS * interval[0]:.1f} to {_CENTS * interval[1]:.1f})" if interval else ""
    return f"{_CENTS * value:.1f} %{between}"


def summary(rows: Sequence[Row], absent: Sequence[Absent], facts: str) -> str:
    """Markdown: a table a concept, a line a method and strength; then the missing metrics and methods by name."""
    parts = [facts, ""]
    for concept in dict.fromkeys(r.concept for r in rows if r.concept or not any(r.concept for r in rows)):
        parts += [
            f"## {words(concept) or 'all prompts'}",
            "",
            *_table([r for r in rows if r.concept in (concept, "")]),
            "",
        ]
    parts += [
        "Shares with Wilson's 95 % interval; p is McNemar's, exact, paired by prompt and seed with unprotected; time "
        "and peak memory are multiples of unprotected's in the same run.",
        "",
    ]
    if absent:
        parts += ["Left out:", "", *(f"- **{words(entry.name)}**: {words(entry.why)}" for entry in absent), ""]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> list[str]:
    shown = [r for r in rows if r.column]
    columns = list(dict.fromkeys((r.column, r.set) for r in shown))
    titles = [words(f"{column}, {name}" if name else column) for column, name in columns]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for method, strength in dict.fromkeys((r.method, r.strength) for r in shown):
        own = {(r.column, r.set): r for r in shown if (r.method, r.strength) == (method, strength)}
        label = method if strength is None else f"{method}, {strength:g}"
        lines.append(f"| {words(label)} | {' | '.join(_cell(own.get(key)) for key in columns)} |")
    return lines


def _cell(entry: Row | None) -> str:
    if entry is None:
        return "not measured"
    p = "" if entry.p_value is None else f", p {entry.p_value:.2g}"
    return number(entry.value, entry.interval, entry.unit) + p


def write_tables(out: Path, rows: Sequence[Row], absent: Sequence[Absent], facts: dict, title: str) -> None:
    """`evaluation.md` (the summary), `evaluation.csv` and `evaluation.json` (every row), each old or new,
    never half."""
    write_text(out / "evaluation.md", summary(rows, absent, title))
    write_text(out / "evaluation.csv", as_csv([asdict(r) for r in rows], [entry.name for entry in fields(Row)]))
    whole = {**facts, "left_out": [entry._asdict() for entry in absent], "rows": [asdict(r) for r in rows]}
    write_text(out / "evaluation.json", json.dumps(whole, indent=2) + "\n")


def as_csv(entries: Sequence[dict], names: Sequence[str]) -> str:
    """Dictionaries as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return file.getvalue()
