"""The work of `saferope evaluate`: your own prompts on any model, a concept file in the tiny world, or a suite.

Each checks all that it can before the model loads. With `dry` it ends there, and tells the memory, disk and time of the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferope_training.console import say
from saferope_training.settings import Settings

from . import dry as rehearsal
from .common import load, progress_bars

if TYPE_CHECKING:
    from saferope_benchmark.evaluation.own import Prompts
    from saferope_benchmark.prompt_sets import PromptSet
    from saferope_benchmark.scores.judges import Wanted

FILE_SIZES = (64, 128)
BATCH, FLUX_BATCH = 32, 4  # prompts painted together


@dataclass(frozen=True)
class Run:
    """The settings of the model, the folder of tables and pictures, the process's device, and how many prompts are
    painted together (None: the model's number).
    """

    settings: Settings
    out: Path
    device: str
    batch: int | None = None
    dry: bool = False

    def many(self, tiny: bool) -> int:
        """Prompts painted together."""
        return self.batch or (BATCH if tiny else FLUX_BATCH)


def prompt_files(
    unsafe: str | None,
    held_out: Path | None,
    benign: str | None,
    neighbours: Path | None,
    unsafe_count: int | None,
    benign_count: int | None,
) -> Prompts:
    """The files and counts of prompts. --unsafe and --benign may each be a file or a count."""
    from saferope_benchmark.evaluation.own import Prompts

    files, counts = [], []
    for name, value, count in (("unsafe", unsafe, unsafe_count), ("benign", benign, benign_count)):
        number = int(value) if value is not None and value.isdecimal() else None
        if number is not None and count is not None:
            raise ValueError(f"--{name}: got a count, and --{name}-count, expected one of them")
        files.append(Path(value) if value is not None and number is None else None)
        counts.append(count if number is None else number)
    if min(count for count in (*counts, 0) if count is not None) < 0:
        raise ValueError(f"counts: got {counts}, expected numbers of at least 0")
    return Prompts(files[0], held_out, files[1], neighbours, counts[0], counts[1])


def own(
    run: Run, file: Path, strength: float, prompts: Prompts, wanted: Wanted, words: str | None, lpips: Path | None
) -> None:
    """Your prompts on any model."""
    from saferope_benchmark.evaluation.file_report import markdown, write_reports
    from saferope_benchmark.evaluation.own import concept_of, evaluate_own, suffix
    from saferope_benchmark.scores import judges
    from saferope_benchmark.scores.distance import lpips_distance
    from saferope_training import processes

    concept, spoken = concept_of(file)
    sets = prompts.sets(concept, words or spoken)
    judges.require(wanted)
    _require_model(run, file)
    if run.dry:
        return _rehearse(run, sets, 2)
    with progress_bars() as progress:
        model = load(run.settings, run.device)
        extra = [lpips_distance(lpips, run.device)] if lpips else []
        many = run.many(model.tiny)
        report = evaluate_own(model, file, run.out, sets, wanted, strength, many, extra, progress)
        stem = f"{file.stem}.{suffix(model.name, sets)}"
        write_reports(run.out, [report], file, [stem])
    if processes.is_main():
        say(f"{markdown(report)}report: {run.out / stem}.md")


def in_tiny_world(run: Run, file: Path, strength: float, unsafe: int | None, benign: int | None) -> None:
    """A concept file by prompts of the tiny world's own."""
    from saferope_benchmark.evaluation.file_report import evaluate_file, markdown, write_reports
    from saferope_benchmark.prompt_sets import Sizes, tiny_world_sets
    from saferope_core import load_concepts, strength_notes
    from saferope_training import processes

    concepts = load_concepts(file)
    notes = strength_notes(concepts, [each.strength * strength for each in concepts])
    for note in notes if processes.is_main() else []:
        say(f"saferope: {note}", err=True)
    unsafe, benign = (own if given is None else given for given, own in zip((unsafe, benign), FILE_SIZES, strict=True))
    sizes = Sizes(unsafe, unsafe, benign // 2, benign)
    if run.dry:
        _require_model(run, file)
        return _rehearse(run, [asked for each in concepts for asked in tiny_world_sets(each.slug, sizes)], 2)
    with progress_bars() as progress:
        model = load(run.settings, run.device)
        reports = evaluate_file(model, file, run.out, strength, sizes, progress=progress)
        write_reports(run.out, reports, file)
    if processes.is_main():
        for report in reports:
            say(markdown(report))


def suite(
    run: Run,
    name: str,
    counts: tuple[int | None, int | None],
    chosen: dict[str, Any],
    of_flux: dict[str, Path | None],
    models: dict[str, Any],
) -> None:
    """A whole comparison. `chosen`: choices of `prepared`. `of_flux`: files of prompts. `models`: models of metrics."""
    from saferope_benchmark import suites
    from saferope_benchmark.evaluation.compare import compare
    from saferope_benchmark.suites.questions import paper_metrics
    from saferope_training import processes
    from saferope_training.flux.models import TINYWORLD

    _require_model(run, None)
    if run.dry:
        tiny = run.settings.model == TINYWORLD and name != suites.PAPER_FLUX
        asked = suites.asked_in(name, tiny, chosen["only"], counts, **({} if tiny else of_flux))
        makes = name in suites.TRAINING or (tiny and chosen["concepts"] is None and name in suites.MAKING)
        return _rehearse(run, asked, 1, training=makes)
    with progress_bars() as progress:
        model = load(run.settings, run.device)
        tiny = suites.is_tiny(name, model)
        if not tiny:
            chosen |= {**of_flux, "metrics": paper_metrics(**models, device=run.device)}
        comparison = suites.prepared(name, model, run.out, counts=counts, progress=progress, **chosen)
        compare(model, comparison, run.out, run.many(tiny), progress)
    if processes.is_main():
        say((run.out / "evaluation.md").read_text(encoding="utf-8"))


def _require_model(run: Run, file: Path | None) -> None:
    """Checks that model and device are there, and that the file's concepts fit the model where its sizes are known."""
    from saferope_core import load_concepts
    from saferope_training.flux import loading
    from saferope_training.flux.attach import geometry_from
    from saferope_training.making import checks

    if run.batch is not None and run.batch < 1:
        raise ValueError(f"--batch: got {run.batch}, expected at least 1")
    checks.require_model(run.settings, run.device)
    if file is not None and loading.is_here(run.settings.model):
        geometry = geometry_from(loading.config_of(run.settings.model, run.settings.encoders))
        for concept in load_concepts(file):
            geometry.require(concept.geometry, f"{file}, concept {concept.slug!r}")


def _rehearse(run: Run, sets: Sequence[PromptSet], methods: int, training: bool = False) -> None:
    """The dry run: pictures of all sets, under so many methods. `training`: concept files are made first."""
    from dataclasses import replace

    from saferope_training.flux.models import TINYWORLD
    from saferope_training.making import estimate

    settings, count = run.settings, sum(len(asked.asks) for asked in sets)
    notes = [] if methods > 1 else ["pictures and their time are of one method; a suite paints them for each"]
    if training:  # as suites train real models, see `settings_for`
        settings = replace(settings, passes_of=1, checkpointing=True) if settings.model != TINYWORLD else settings
        notes += ["a suite makes concept files and baselines first: their time is not counted"]
    else:
        settings = replace(settings, passes_of=run.many(settings.model == TINYWORLD))
    say(f"prompts: {count}, so {methods * count} pictures")
    task = estimate.Task(settings, (), "", pictures=methods * count)
    rehearsal.tell(task, estimate.shape_of(settings), run.out, run.device, training, notes)
