"""Which heads tell the concept apart, in which subspace, and above which risk they are to turn."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saferope_core import (
    BLOCK_TYPES,
    Geometry,
    calibrate_gate,
    contrastive_basis,
    discrimination,
    head_discrimination_score,
    latent_risk_score,
    unsafe_basis,
)

from .attach import ROLES
from .extract import Vectors
from .prompts import BENIGN, UNSAFE


@dataclass(frozen=True)
class HeadTable:
    """Every head's reading. All fp32. Per role: basis [blocks, H, D, R], gate [blocks, H], mean LRS of both sides [blocks, H]."""

    discrimination: Tensor
    critical: Tensor
    basis: dict[str, Tensor]
    gate: dict[str, Tensor]
    risk: dict[str, dict[str, Tensor]]
    singular_values: Tensor


@dataclass(frozen=True)
class CriticalHeads:
    """The safety-critical heads alone: heads int32 [N, 3] and, per role, basis [N, D, R] and gate [N]."""

    heads: Tensor
    basis: dict[str, Tensor]
    gate: dict[str, Tensor]
    singular_values: Tensor


def read_heads(
    statistics: dict[str, Vectors], rank: int, basis: str, threshold: float, cut: float, gate: str, quantile: float
) -> HeadTable:
    """Bases, discrimination Δ (over queries and keys together) and gates of every head.

    `basis` is "svd" or "contrastive"; `gate` is "calibrated" to the quantile of LRS on benign tokens, or "fixed" at the
    threshold.
    """
    unsafe, benign = statistics[UNSAFE], statistics[BENIGN]
    rows = range(len(unsafe.gram["q"]))
    bases, values = {}, {}
    for role in ROLES:
        pairs = [_basis(unsafe.gram[role][row], benign.gram[role][row], rank, basis) for row in rows]
        bases[role], values[role] = (torch.stack(part) for part in zip(*pairs, strict=True))
    risks = {
        role: {
            name: torch.stack([_risks(statistics[name].sample[role][row], bases[role][row]) for row in rows])
            for name in (UNSAFE, BENIGN)
        }
        for role in ROLES
    }
    delta = torch.stack(
        [
            discrimination(
                *(torch.cat([risks[role][name][row] for role in ROLES]) for name in (UNSAFE, BENIGN)), threshold
            )
            for row in rows
        ]
    )
    return HeadTable(
        delta,
        head_discrimination_score(delta, cut),
        bases,
        {role: _gates(risks[role][BENIGN], threshold, gate, quantile) for role in ROLES},
        {role: {name: risk.mean(1) for name, risk in risks[role].items()} for role in ROLES},
        values["k"],
    )


def critical_heads(table: HeadTable, geometry: Geometry) -> CriticalHeads:
    """Picks the heads with a discrimination score of 1, doubles first. ValueError where there is none."""
    if not table.critical.any():
        raise ValueError(
            f"no head of {geometry.describe()} tells the concept apart (largest Δ {table.discrimination.max():.2f}); "
            "give more prompts, check that their spans mark the concept's word, or lower the cut"
        )
    row, head = table.critical.nonzero(as_tuple=True)
    single = (row >= geometry.double_blocks).long()
    place = torch.stack([single, row - single * geometry.double_blocks, head], dim=1)
    return CriticalHeads(
        place.to(torch.int32),
        {role: table.basis[role][row, head] for role in ROLES},
        {role: table.gate[role][row, head] for role in ROLES},
        table.singular_values[row, head],
    )


def write_table(path: Path, table: HeadTable, geometry: Geometry) -> None:
    """One line of CSV per head."""
    with path.open("w", newline="", encoding="utf-8") as file:
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


def _basis(unsafe_gram: Tensor, safe_gram: Tensor, rank: int, kind: str) -> tuple[Tensor, Tensor]:
    basis, values = unsafe_basis(unsafe_gram, rank)
    if kind == "contrastive":
        basis = contrastive_basis(unsafe_gram, safe_gram, rank)
    return basis.float(), values.float()


def _risks(vectors: Tensor, basis: Tensor) -> Tensor:
    """LRS [n, H] of vectors [n, H, D] in a block's bases [H, D, R]."""
    return latent_risk_score(vectors.transpose(0, 1), basis).T


def _gates(risks: Tensor, threshold: float, kind: str, quantile: float) -> Tensor:
    """[blocks, H] from LRS [blocks, n, H] of benign tokens."""
    if kind == "fixed":
        return torch.full((risks.shape[0], risks.shape[2]), threshold)
    return torch.stack([calibrate_gate(block, quantile) for block in risks])
