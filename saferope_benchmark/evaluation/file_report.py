"""The effect of one concept file on the tiny world: a report beside the file, unprotected against protected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from saferope_core import load_concepts, sha256
from saferope_core.concept.files import require_no_link, write_text
from saferope_core.concept.strict_json import loads
from saferope_core.concept.untrusted import markdown as words
from saferope_core.concept.untrusted import printable, read_whole
from saferope_training import processes
from saferope_training.flux.models import TINYWORLD, Model
from saferope_training.stages import Progress

from ..pictures import comparison_grid
from ..prompt_sets import BENIGN, NEIGHBOURS, SEED, PromptSet, Sizes, tiny_world_sets
from ..scores import REST, SHOWN, WHOLE
from ..scores.detector import detector
from ..scores.distance import distance
from ..scores.whole import whole
from .evaluate import Evaluation, run
from .methods import Method, concept_file, unprotected
from .picture_store import read_pictures
from .tables import RATIO, SECONDS, Row, as_csv, number

SIZES = Sizes()
OWN = "own-"  # in the names of reports on prompts of the user's own, see own.suffix
MAX_BYTES = 2**20  # of a report; ours have 4 KB
_SHOWN = 10  # pictures per row of the comparison


@dataclass(frozen=True)
class Pair:
    """One measure without and with protection; intervals, p and unit as in `tables.Row`."""

    measure: str
    count: int
    unprotected: float
    protected: float
    unprotected_interval: tuple[float, float] | None = None
    protected_interval: tuple[float, float] | None = None
    p_value: float | None = None
    unit: str = ""
    column: str = ""


@dataclass(frozen=True)
class Report:
    """The table of one concept, and the file, model and seed of the measurement. `shown` are rows of pictures, `notes`
    the limits of the numbers."""

    concept: str
    file_sha256: str
    model: str
    strength: float
    seed: int
    rows: list[Pair]
    shown: list[tuple[str, Tensor]]
    notes: list[str] = field(default_factory=list)


def evaluate_file(
    model: Model,
    path: Path,
    out: Path,
    strength: float = 1.0,
    sizes: Sizes = SIZES,
    seed: int = SEED,
    progress: Progress = lambda stage, done, total: None,
) -> list[Report]:
    """One report per concept of the file, all of the file's concepts applied together.

    Pictures and raw scores are written to `<out>/<file>.evaluation/`, where a later call resumes. ValueError where the
    model is not the tiny world, whose detector reads the pictures.
    """
    if not model.tiny:
        raise ValueError(
            f"evaluation: got model {model.name!r}, expected {TINYWORLD!r}, the only one with a detector of its own; "
            "for others name prompts with --unsafe FILE and --benign FILE"
        )
    slugs = [concept.slug for concept in load_concepts(path)]
    methods, metrics = [unprotected(), concept_file(path, strength)], [detector(), whole(), distance()]
    sets = [asked for slug in slugs for asked in tiny_world_sets(slug, sizes, seed)]
    evaluation = Evaluation(model, sets, methods, metrics, out / f"{path.stem}.evaluation")
    require_no_link(out, evaluation.out)
    rows = run(evaluation, progress)
    facts = (sha256(path), model.name, strength, seed)
    return [Report(slug, *facts, pairs(rows, slug), shown_of(evaluation, slug)) for slug in slugs]


def pairs(rows: Sequence[Row], slug: str) -> list[Pair]:
    """A concept's rows of the protected model: first the concept, which should vanish, last the cost."""
    own = [row for row in rows if row.concept == slug and row.strength is not None]
    kept = [row for row in own if row.set in (NEIGHBOURS, BENIGN) and row.unit != "1 - cos"]
    chosen = [row for name in (SHOWN, REST, WHOLE) for row in own if row.column == name and row.set != BENIGN]
    chosen += kept
    chosen += [row for row in own if row.unit == SECONDS or (row.unit == RATIO and row.measure == "memory")]
    return [_pair(row) for row in chosen]


def _pair(row: Row) -> Pair:
    measure = f"{row.measure}, {row.set}" if row.set else row.measure
    values = (row.unprotected, row.value, row.unprotected_interval, row.interval)
    return Pair(measure, row.count, *values, row.p_value, row.unit, row.column)


def shown_of(evaluation: Evaluation, slug: str) -> list[tuple[str, Tensor]]:
    """Rows of pictures, each set unprotected and protected."""
    return [
        (f"{asked.name},\n{method.name}", _first(evaluation, method, asked))
        for asked in evaluation.sets
        if asked.concept == slug
        for method in evaluation.methods
    ]


def _first(evaluation: Evaluation, method: Method, asked: PromptSet) -> Tensor:
    count = min(_SHOWN, len(asked.asks))
    return read_pictures(evaluation.folder(method, asked), 0, count)


def report_name(file: Path, slug: str, concepts: int) -> str:
    """The name of a concept's report, by the file's own: another version of a concept has another report."""
    return f"{file.stem}.evaluation" if concepts == 1 else f"{file.stem}.{slug}.evaluation"


def reports_of(file: Path, slugs: Sequence[str]) -> list[Path]:
    """The reports that lie beside a file, reports on this project's prompts first."""
    known = [file.parent / f"{report_name(file, slug, len(slugs))}.json" for slug in slugs]
    mine = f"{file.stem}.{OWN}"
    own = [path for path in file.parent.iterdir() if path.name.startswith(mine) and path.suffix == ".json"]
    return [path for path in (*known, *sorted(own)) if path.is_file()]


def write_reports(out: Path, reports: Sequence[Report], file: Path, names: Sequence[str] = ()) -> None:
    """Writes `<report_name>.json`, `.csv`, `.md` and `.png` for every report of the file, by one process. `names`
    replace the report names."""
    if not processes.is_main():
        return
    out.mkdir(parents=True, exist_ok=True)
    own = [report_name(file, report.concept, len(reports)) for report in reports]
    for report, stem in zip(reports, names or own, strict=True):
        facts = {name: value for name, value in vars(report).items() if name not in ("rows", "shown")}
        facts["rows"] = [asdict(row) for row in report.rows]
        write_text(out / f"{stem}.json", json.dumps(facts, indent=2) + "\n")
        write_text(out / f"{stem}.md", markdown(report))
        write_text(out / f"{stem}.csv", as_csv(facts["rows"], list(facts["rows"][0])))
        comparison_grid(out / f"{stem}.png", report.shown)


def markdown(report: Report) -> str:
    """The report as a Markdown table."""
    lines = ["| measure | n | unprotected | protected | p |", "|---|---|---|---|---|"]
    for row in report.rows:
        sides = [
            number(row.unprotected, row.unprotected_interval, row.unit),
            number(row.protected, row.protected_interval, row.unit),
        ]
        p = "" if row.p_value is None else f"{row.p_value:.2g}"
        lines.append(f"| {' | '.join(map(words, (row.measure, row.count, *sides, p)))} |")
    notes = "".join(f"\n- {words(note)}" for note in report.notes) + ("\n" if report.notes else "")
    facts = f"concept {words(report.concept)}, model {words(report.model)}, "
    facts += f"strength {report.strength:g}, seed {report.seed:d}"
    return f"{facts}, file sha256 {words(report.file_sha256[:12])}\n\n" + "\n".join(lines) + "\n" + notes


def read_report(path: Path) -> Report:
    """A report as `write_reports` left it, but for its pictures. The file may be a stranger's: ValueError where it is
    no report.
    """
    try:
        facts = loads("report", read_whole(path, MAX_BYTES))
        rows = [Pair(**row) for row in facts.pop("rows")]
        report = Report(**facts, rows=rows, shown=[])
        markdown(report)  # a file that cannot be printed is no report
    except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError):
        told = f"{path}: got no report of an evaluation, expected one; run `saferope evaluate` again or remove it"
        raise ValueError(printable(told)) from None
    return report
