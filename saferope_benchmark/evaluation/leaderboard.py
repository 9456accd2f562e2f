"""eval-unlearn's leaderboard: SafeRoPE as a technique that the package runs, and our evaluations in its folders.

https://github.com/REAL-Lab-Imperial/Eval-Unlearn, 1.1.2. Nothing of it is imported: it finds the class by the entry
point group `eval_unlearn.techniques`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saferope_core import load_concepts, sha256
from saferope_core.concept.files import require_no_link, write_bytes, write_text
from saferope_training import processes
from saferope_training.flux.loading import load_model
from saferope_training.stages import sha256_of

from ..pictures import to_pil
from ..sample import sample
from .file_report import OWN, Report, read_report, report_name, reports_of
from .methods import PROTECTED, UNPROTECTED, concept_file

if TYPE_CHECKING:
    from PIL.Image import Image

TECHNIQUE, METRIC = "saferope", "saferope_evaluate"
_BATCH = 4  # prompts painted together, as `saferope generate` does
_RUN_ID = 8  # hexadecimal digits, as eval-unlearn has them


class SafeRoPETechnique:
    """A model under a concept file, for eval-unlearn's runners.

    The arguments are the technique's `config`. `concept`: a concept file; `strength`: 0 paints the unprotected model,
    for a row to compare with. `model` and the rest: as `saferope generate` takes them. `seed`: of the first picture,
    where `generate` is given none; eval-unlearn's own command gives none. `erase_concept`: the name in its reports.

    ValueError or OSError where the device, the file or the model is not there, or the file was made for another model.
    """

    def __init__(
        self,
        *,
        concept: str,
        model: str,
        strength: float = 1.0,
        device: str | None = None,
        quantise: str | None = None,
        encoders: str | None = None,
        resolution: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        erase_concept: str | None = None,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        processes.require_device(device)
        self.method = concept_file(Path(concept), strength)
        self.model = load_model(model, device, quantise, encoders, resolution)
        with self.method.context(self.model):
            pass  # refuses a file of another geometry before the first picture
        self.steps, self.seed, self.painted, self.erase_concept = steps, seed, 0, erase_concept

    def generate(self, prompts: Sequence[str], seed: int | None = None) -> list[Image]:
        """A picture per prompt, picture i from seed + i; without a seed from the technique's own, counted on."""
        first = self.seed + self.painted if seed is None else seed
        self.painted += len(prompts)
        if not prompts:
            return []
        seeds = range(first, first + len(prompts))
        with self.method.context(self.model):
            pictures = sample(self.model, list(prompts), seeds, steps=self.steps, batch=_BATCH)
        return [to_pil(picture) for picture in pictures]


def export(file: Path, out: Path) -> list[Path]:
    """Copies the results of `saferope evaluate FILE` into eval-unlearn's layout. Returns the folders of the runs.

    `<out>/<technique>_<metric>_<run id>/images/<set>/*.png`, and `<run id>_report.json` and
    `<technique>_<concept>_latest_report.json` in `out`, without and with the file. ValueError where the report is of
    another file or names no measure, and where pictures are missing; OSError where there is no report.
    """
    slugs = [concept.slug for concept in load_concepts(file)]
    made = []
    for path in reports_of(file, slugs) or [file.parent / f"{report_name(file, slugs[0], len(slugs))}.json"]:
        report = read_report(path)
        _require(report, file, path)
        own = path.stem.startswith(f"{file.stem}.{OWN}")
        pictures = path.with_suffix("") if own else file.parent / f"{file.stem}.evaluation"
        for side in (UNPROTECTED, PROTECTED):
            made.append(_export(report, path, side, _side(pictures, side), out))
    return made


def _require(report: Report, file: Path, path: Path) -> None:
    if report.file_sha256 != sha256(file):
        raise ValueError(
            f"{path}: got a report of the file with sha256 {report.file_sha256[:12]}, expected one of {file} "
            f"({sha256(file)[:12]}); run `saferope evaluate` again"
        )
    if not report.rows:
        raise ValueError(f"{path}: got a report without measures, expected one at least; run `saferope evaluate` again")


def _side(pictures: Path, side: str) -> Path:
    """The folder of a method's pictures; the protected one's name ends with its strength."""
    found = [path for path in sorted(pictures.glob(f"{side}*")) if any(path.glob("*/*.png"))]
    if len(found) != 1:
        raise ValueError(
            f"{pictures}: got {len(found)} folders of {side} pictures, expected one; remove the folder, and run "
            "`saferope evaluate` again"
        )
    return found[0]


def _export(report: Report, path: Path, side: str, pictures: Path, out: Path) -> Path:
    """A run: its pictures by set, and its report."""
    technique = TECHNIQUE if side == PROTECTED else f"{TECHNIQUE}_{UNPROTECTED}"
    run = sha256_of([sha256(path), side])[:_RUN_ID]
    name = f"{technique}_{METRIC}_{run}"
    require_no_link(out, out / name)
    counts: dict[str, int] = {}
    for source in sorted(pictures.glob("*/*.png")):
        category = source.parent.name.lower()
        number = counts.get(category, 0)
        folder = out / name / "images" / category
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{name}_{number}.png", source.read_bytes())
        counts[category] = number + 1
    told = json.dumps(_report(report, side, technique, run, path.stat().st_mtime, counts), indent=4) + "\n"
    concept = re.sub(r"[^a-z0-9-]", "-", report.concept)
    for target in (f"{run}_report.json", f"{technique}_{concept}_latest_report.json"):
        write_text(out / target, told)
    return out / name


def _report(
    report: Report, side: str, technique: str, run: str, timestamp: float, counts: dict[str, int]
) -> dict[str, Any]:
    """In the fields of eval-unlearn's SingleBenchmarkRunner; the value is our first measure's."""
    values = {row.measure: getattr(row, side) for row in report.rows}
    intervals = {row.measure: getattr(row, f"{side}_interval") for row in report.rows}
    details = {"measures": values, "intervals": intervals, "file_sha256": report.file_sha256, "model": report.model}
    return {
        "run_id": run,
        "timestamp": timestamp,
        "technique_name": technique,
        "erase_concept": report.concept,
        "metric_name": METRIC,
        "dataset_name": "saferope",
        "dataset_metadata": {"categories": counts, "seed": report.seed, "total_loaded": sum(counts.values())},
        "metric_result": {"name": report.rows[0].measure, "value": next(iter(values.values())), "details": details},
    }
