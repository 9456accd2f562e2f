"""The facts about heads, on disk: a table for people, tensors for the next stage."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from saferope_core import (
    BENIGN,
    BLOCK_TYPES,
    ROLES,
    UNSAFE,
    CriticalHeads,
    Geometry,
    HeadTable,
    Ranks,
    Statistics,
    read_heads,
)
from saferope_core.concept.families import FAMILIES
from saferope_core.concept.files import placed
from saferope_core.measure.generators import fixed_generators, random_generators

from ..settings import Settings
from ..stages import load_tensors, save_tensors

QUANTILE, TEMPLATE_QUANTILE, TEMPLATE_PADDING = 0.999, 0.995, 4  # measured on the tiny FLUX and the tiny Qwen-Image


def for_family(settings: Settings, family: str) -> Settings:
    """The settings, with the family's values for `quantile` and `relative_padding` where they are None.

    A language model's states behind the prompt hold the whole prompt, in other directions than the subject's own state.
    So risk is measured in directions of these states too, above gates that more benign tokens pass.
    """
    template = family in FAMILIES and FAMILIES[family].template
    more, quantile = settings.relative_padding, settings.quantile
    if more is not None and quantile is not None:
        return settings
    if more is None:
        more = TEMPLATE_PADDING if template and settings.relative_rank else 0
    if quantile is None:
        quantile = TEMPLATE_QUANTILE if template else QUANTILE
    return replace(settings, relative_padding=more, quantile=quantile)


def ranks_of(settings: Settings) -> Ranks:
    """The dimensions of heads' spaces that the settings ask for."""
    s = settings
    relative = s.relative_rank, s.relative_padding or 0
    return Ranks(s.rank, s.padding_rank, s.words_rank, s.reach, s.image_rank, *relative)


def table_of(statistics: Statistics, settings: Settings, geometry: Geometry) -> HeadTable:
    """`read_heads` as the settings ask for it, and for the rest as the model's family decides."""
    s = for_family(settings, geometry.family)
    assert s.quantile is not None
    return read_heads(statistics, ranks_of(s), s.basis, s.threshold, s.cut, s.gate, s.quantile)


def write_table(path: Path, table: HeadTable, geometry: Geometry) -> None:
    """One line of CSV per head."""
    with placed(path) as new, new.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        risks = [f"lrs_{name}_{role}" for role in ROLES for name in (UNSAFE, BENIGN)]
        writer.writerow(["block_type", "block", "head", "discrimination", "critical", "gate_q", "gate_k", *risks])
        for row in range(geometry.blocks):
            single = row >= geometry.double_blocks
            block = row - geometry.double_blocks if single else row
            for head in range(geometry.heads):
                numbers = [table.gate[role][row, head] for role in ROLES]
                numbers += [table.risk[role][name][row, head] for role in ROLES for name in (UNSAFE, BENIGN)]
                numbers = [table.discrimination[row, head], *numbers]
                delta, *others = (f"{number:.4f}" for number in numbers)
                writer.writerow([BLOCK_TYPES[single], block, head, delta, int(table.critical[row, head]), *others])


def save_critical(path: Path, critical: CriticalHeads, discrimination: Tensor) -> None:
    """Writes the safety-critical heads and Δ of all heads as safetensors."""
    tensors = {"heads": critical.heads, "discrimination": discrimination, "singular_values": critical.singular_values}
    tensors["reach"] = torch.tensor(critical.reach)
    for kind, named in (("basis", critical.basis), ("gate", critical.gate), ("full", critical.full)):
        tensors |= {f"{kind}_{name}": tensor for name, tensor in named.items()}
    save_tensors(path, tensors)


def load_critical(path: Path, geometry: Geometry) -> tuple[CriticalHeads, Tensor]:
    """Reads a file of `save_critical`. ValueError where it is not of a model of this geometry."""
    shapes = {f"basis_{role}": (None, geometry.head_dim, None) for role in ROLES} | {"heads": (None, 3), "reach": ()}
    tensors = load_tensors(path, shapes | {"discrimination": (geometry.blocks, geometry.heads)})
    basis, gate, full = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("basis_", "gate_", "full_")
    )
    reach = int(tensors["reach"])
    critical = CriticalHeads(
        tensors["heads"], basis, gate, tensors["singular_values"], reach, full, geometry.image_blocks
    )
    return critical, tensors["discrimination"]


def untrained(heads: CriticalHeads, settings: Settings) -> tuple[Tensor, Tensor]:
    """Skew generators (text, image): "fixed" planes turned by one angle, or "random" ones."""
    if settings.generator == "random":
        return random_generators(heads, settings.seed, settings.text_init, settings.image_init)
    return fixed_generators(heads, settings.angle)
