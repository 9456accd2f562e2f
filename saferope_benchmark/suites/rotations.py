"""The paper's figure 5: random rotations on the heads that tell the concept apart, on all heads, and on the others
alone.

As in its equation 7 every token turns by its risk, with no gate, in the paper's subspaces (rank 5). The generators are
drawn at random. The three differ only in the heads that turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from saferope_core import Concept, HeadTable, Protection, critical_heads, random_generators, sha256
from saferope_training.flux.attach import attached
from saferope_training.flux.models import Model
from saferope_training.making.extract import load_statistics
from saferope_training.making.heads import table_of
from saferope_training.making.recipe import STATISTICS, Recipe
from saferope_training.settings import PAPER
from saferope_training.stages import Progress

from ..evaluation.methods import Method
from .contenders import settings_for

TELLING, ALL, OTHERS = "heads of high Δ", "all heads", "other heads"
AMOUNTS = (0.25, 0.5, 1.0, 2.0)  # of a generator W - W^T, W of standard normal numbers


def random_rotations(
    model: Model, folder: Path, concepts: Sequence[str], progress: Progress, seed: int = 0
) -> list[Method]:
    """Three groups of heads at every amount, for each concept; statistics are made in `folder/<slug>`, or taken from
    there.
    """
    found = []
    for slug in concepts:
        s = settings_for(model, slug, **PAPER)
        Recipe(model, s, folder / slug, progress).extract()
        path = folder / slug / STATISTICS
        statistics = load_statistics(path, model.geometry)
        table = table_of(statistics, s, model.geometry)
        for name, chosen in groups(table).items():
            concept = _concept(model, slug, replace(table, critical=chosen), seed)
            found += [_method(concept, name, slug, amount, sha256(path)) for amount in AMOUNTS]
    return found


def groups(table: HeadTable) -> dict[str, Tensor]:
    """Bool [blocks, H] for each group. The safety-critical heads are one group, or the half of highest Δ where every
    head is safety-critical."""
    chosen = table.critical
    if chosen.all():
        highest = table.discrimination.flatten().argsort(descending=True, stable=True)[: chosen.numel() // 2]
        chosen = torch.zeros_like(chosen).flatten().index_fill(0, highest, True).view_as(chosen)
    return {TELLING: chosen, ALL: torch.ones_like(chosen), OTHERS: ~chosen}


def _concept(model: Model, slug: str, table: HeadTable, seed: int) -> Concept:
    heads = critical_heads(table, model.geometry)
    heads = replace(heads, gate={name: torch.zeros_like(gate) for name, gate in heads.gate.items()})
    return Concept(
        slug=slug,
        name=slug,
        description="random generators",
        geometry=model.geometry,
        discrimination=table.discrimination,
        mode="random",
        **heads.fields(random_generators(heads, seed, 1.0, 1.0), "qk"),
    )


def _method(concept: Concept, name: str, slug: str, amount: float, statistics: str) -> Method:
    # not a protection's strength, which ends at half a turn: random generators may turn further
    streams = {"text": concept.text, "image": concept.image}
    scaled = replace(
        concept, **{key: replace(each, generator=each.generator * amount) for key, each in streams.items()}
    )

    @contextmanager
    def context(model: Model) -> Iterator[None]:
        with attached(model.transformer, Protection([scaled], model.geometry).rotate):
            yield

    return Method(name, f"random rotations of {name}, {statistics}, at {amount!r}", context, slug, amount)
