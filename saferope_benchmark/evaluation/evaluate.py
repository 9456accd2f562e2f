"""One harness for every method: the same prompts and seeds under each, scored, stored as it comes, and put in a table.

Paired by prompt and seed. An interrupted run resumes at the last whole chunk and gives the same table. Of several
processes (`accelerate launch`) each takes its share of the chunks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saferope_core.concept.files import require_no_link, write_text
from saferope_training import processes
from saferope_training.flux.identity import identity
from saferope_training.flux.models import TINYWORLD, Model, encode
from saferope_training.prompts.lines import json_line
from saferope_training.stages import Progress, sha256_of

from ..pictures import comparison_grid
from ..prompt_sets import UNSAFE, Ask, PromptSet, concepts_of
from ..sample import sample
from ..scores import Absent, Metric, Scores
from . import tables
from .cost import measured
from .methods import UNPROTECTED, Method
from .picture_store import joined, read_cost, read_pictures, read_scores, write_pictures, write_scores
from .tables import Row

BATCH = 32  # prompts painted together
RAW = "scores.jsonl"
_PER_SET = 5  # pictures of a set in a grid


@dataclass(frozen=True)
class Evaluation:
    """Methods, and the prompt sets to compare them on. All methods are paired with the first, the unprotected model."""

    model: Model
    sets: Sequence[PromptSet]
    methods: Sequence[Method]
    metrics: Sequence[Metric]
    out: Path
    batch: int = BATCH
    weights: str = ""  # the model's `identity`, where it is known already

    def chunks(self) -> list[tuple[PromptSet, int]]:
        """Sets and first prompts of all chunks, in a fixed order."""
        return [(asked, first) for asked in self.sets for first in range(0, len(asked.asks), self.batch)]

    def folder(self, method: Method, asked: PromptSet) -> Path:
        """Where the method's pictures of a set lie."""
        return self.out / method.folder / asked.folder


def run(evaluation: Evaluation, progress: Progress = lambda stage, done, total: None) -> list[Row]:
    """Paints and scores the chunks that are missing. Returns the table's rows, the same in every process.

    ValueError where the methods do not begin with the unprotected model, two of them share a folder, or a folder is a
    link.
    """
    _check(evaluation)
    key_of = _keys(evaluation)
    _paint(evaluation, key_of, progress)
    processes.wait()
    _score(evaluation, key_of, progress)
    processes.wait()
    rows = [row for asked in evaluation.sets for row in _rows(evaluation, asked, key_of)]
    return rows + _costs(evaluation, key_of)


def _check(e: Evaluation) -> None:
    if not e.methods or e.methods[0].name != UNPROTECTED:
        raise ValueError(f"methods: got {[m.name for m in e.methods]}, expected {UNPROTECTED!r} as the first")
    for kind, names in (("methods", [m.folder for m in e.methods]), ("prompt sets", [s.folder for s in e.sets])):
        if len(set(names)) < len(names):
            raise ValueError(f"{kind}: got {names}, expected different names; give one of two the same another")
    for method in e.methods:
        for asked in e.sets:
            require_no_link(e.out, e.folder(method, asked))


Keys = Callable[[Method, PromptSet, int], str]


def _keys(e: Evaluation) -> Keys:
    """Names all that decides a chunk's pictures."""
    model, weights = e.model, e.weights or identity(e.model)
    painter = [model.name == TINYWORLD, model.steps, model.guidance, model.latent_side, model.text_length, weights]

    def key(method: Method, asked: PromptSet, first: int) -> str:
        asks = asked.part(first, e.batch).asks
        return sha256_of([painter, method.identity, [[ask.text, ask.seed] for ask in asks]])

    return key


def _own(e: Evaluation) -> list[tuple[PromptSet, int]]:
    """This process's share of the chunks."""
    chunks = e.chunks()
    pictures = [len(s.part(f, e.batch).asks) * sum(m.paints(s) for m in e.methods) for s, f in chunks]
    return [chunks[number] for number in processes.fair_share(pictures)]


def _paint(e: Evaluation, key_of: Keys, progress: Progress) -> None:
    """Every chunk under all methods, one after the other, so that all of them meet the machine in the same mood."""
    work = _painting(e, _own(e), key_of)
    missing, total = _missing(work), _pictures(work)
    done = total - _pictures(missing)
    progress("pictures", done, total)
    for part in missing:
        with part.method.context(e.model), measured(e.model.device) as cost:
            pictures = paint(e.model, [ask.text for ask in part.asks], [ask.seed for ask in part.asks])
        write_pictures(part.folder, part.first, pictures, cost, part.key)
        done += len(part.asks)
        progress("pictures", done, total)


def unpainted(e: Evaluation) -> int:
    """How many pictures of all methods are not there yet."""
    return _pictures(_missing(_painting(e, e.chunks(), _keys(e))))


class _Part(NamedTuple):
    """A chunk under a method: its prompts, where its pictures lie, the first's number, and what decides them."""

    asks: Sequence[Ask]
    folder: Path
    first: int
    method: Method
    key: str


def _painting(e: Evaluation, chunks: Sequence[tuple[PromptSet, int]], key_of: Keys) -> list[_Part]:
    return [
        _Part(asked.part(first, e.batch).asks, e.folder(m, asked), first, m, key_of(m, asked, first))
        for asked, first in chunks
        for m in e.methods
        if m.paints(asked)
    ]


def _missing(parts: Sequence[_Part]) -> list[_Part]:
    return [part for part in parts if read_cost(part.folder, part.first, len(part.asks), part.key) is None]


def _pictures(parts: Sequence[_Part]) -> int:
    return sum(len(part.asks) for part in parts)


def paint(model: Model, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1] in one batch: by the tiny world's own sampler there, else by `sample`.

    Prompts are read by `encode`, so that a method's change of their embeddings holds.
    """
    if model.name == TINYWORLD:
        from tinyworld.model import generate

        text = encode(model, texts)
        return generate(model.pipe, texts, seeds, batch=len(texts), encoded=(text.states, text.pooled))
    return sample(model, texts, seeds, batch=len(texts))


def _score(e: Evaluation, key_of: Keys, progress: Progress) -> None:
    work = [(s, f, m) for s, f in _own(e) for m in e.methods if m.paints(s)]
    for done, (asked, first, method) in enumerate(work, start=1):
        part, folder = asked.part(first, e.batch), e.folder(method, asked)
        missing = [
            m
            for m in e.metrics
            if read_scores(folder, first, m.name, _score_key(e, key_of, *work[done - 1], m)) is None
        ]
        if missing:
            base, own = (read_pictures(e.folder(m, asked), first, len(part.asks)) for m in (e.methods[0], method))
            for metric in missing:
                key = _score_key(e, key_of, asked, first, method, metric)
                write_scores(folder, first, metric.name, metric.scores(own, part, base), key)
        progress("scores", done, len(work))


def _score_key(e: Evaluation, key_of: Keys, asked: PromptSet, first: int, method: Method, metric: Metric) -> str:
    part = asked.part(first, e.batch)
    about = [[ask.scene, ask.image] for ask in part.asks]
    pictures = [key_of(m, asked, first) for m in (e.methods[0], method)]
    return sha256_of([pictures, metric.needs, asked.concept, asked.words, asked.kind, about])


def scores_of(e: Evaluation, key_of: Keys, asked: PromptSet, method: Method, metric: Metric) -> Scores:
    """A metric's scores of a whole set."""
    parts = []
    for first in range(0, len(asked.asks), e.batch):
        key = _score_key(e, key_of, asked, first, method, metric)
        parts.append(read_scores(e.folder(method, asked), first, metric.name, key))
        assert parts[-1] is not None, f"{asked.folder}, {method.folder}: not scored by {metric.name}"
    return joined(parts)


def _rows(e: Evaluation, asked: PromptSet, key_of: Keys) -> Iterator[Row]:
    painting = [method for method in e.methods if method.paints(asked)]
    for metric in e.metrics:
        base = scores_of(e, key_of, asked, e.methods[0], metric)
        references = metric.aggregate(asked, base, base)
        for method in painting:
            own = metric.aggregate(asked, scores_of(e, key_of, asked, method, metric), base)
            yield from (tables.row(method, asked, name, m, references[name]) for name, m in own.items())


def _costs(e: Evaluation, key_of: Keys) -> list[Row]:
    rows = []
    for concept in concepts_of(e.sets) or [""]:
        for method in (m for m in e.methods if m.concept in ("", concept)):
            sets = {s.folder for s in e.sets if s.concept in ("", concept)}
            chunks = [(s, f, len(s.part(f, e.batch).asks)) for s, f in e.chunks() if s.folder in sets]
            own, base = (
                [read_cost(e.folder(m, s), f, n, key_of(m, s, f)) for s, f, n in chunks] for m in (method, e.methods[0])
            )
            rows += tables.cost_rows(method, concept, own, base, sum(n for _, _, n in chunks))
    return rows


def write_raw(e: Evaluation) -> None:
    """`scores.jsonl`: a line a picture with all its scores, numbers alone (features stay in the chunks' files)."""
    key_of, lines = _keys(e), []
    for asked in e.sets:
        for method in (m for m in e.methods if m.paints(asked)):
            found = {metric.name: scores_of(e, key_of, asked, method, metric) for metric in e.metrics}
            flat = {
                f"{m}/{name}": v.tolist() for m, scores in found.items() for name, v in scores.items() if v.ndim == 1
            }
            for index, ask in enumerate(asked.asks):
                picture = f"{method.folder}/{asked.folder}/{index:04d}.png"
                entry = {"picture": picture, "prompt": ask.text, "seed": ask.seed, "concept": asked.concept}
                entry |= {name: values[index] for name, values in flat.items()}
                lines.append(json_line(entry))
    write_text(e.out / RAW, "".join(lines))


def write_grids(e: Evaluation, seed: int = 0) -> None:
    """`pairs-<concept>.png`: a row a method, the same prompts and seeds in each column, drawn by the seed,
    not by eye."""
    for concept in concepts_of(e.sets) or [""]:
        sets = [asked for asked in e.sets if asked.concept in ("", concept)]
        chosen = []
        for asked in sorted(sets, key=lambda s: s.kind != UNSAFE):  # first the concept, which should vanish
            count = len(asked.asks)
            picked = sorted(random.Random(f"{seed} {asked.folder}").sample(range(count), min(_PER_SET, count)))
            chosen += [(asked, index) for index in picked]
        rows = []
        for method in (m for m in e.methods if m.concept in ("", concept)):
            rows.append((method.label, torch.cat([read_pictures(e.folder(method, s), i, 1) for s, i in chosen])))
        titles = [asked.name if not i % _PER_SET else "" for i, (asked, _) in enumerate(chosen)]
        comparison_grid(e.out / f"pairs-{concept or 'all'}.png", rows, titles)


def write(e: Evaluation, rows: Sequence[Row], absent: Sequence[Absent], title: str) -> None:
    """Tables, raw scores and grids, by one process."""
    if processes.is_main():
        facts = {"model": e.model.name, "steps": e.model.steps, "batch": e.batch}
        facts["methods"] = [
            {"name": m.name, "concept": m.concept, "strength": m.strength, "made_from": m.identity} for m in e.methods
        ]
        tables.write_tables(e.out, rows, absent, facts, title)
        write_raw(e)
        write_grids(e)
