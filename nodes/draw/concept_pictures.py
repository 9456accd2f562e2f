"""A concept for people: the map of its heads, the spectrum of its subspace, its first lines."""

from __future__ import annotations

import torch
from torch import Tensor

from ...saferope_core import Concept, Geometry
from ...saferope_core.concept.untrusted import quoted
from .charts import bars, heat_map


def introduced(concept: Concept) -> list[str]:
    """A concept's slug and name, and what its file says of it."""
    return [f"concept {concept.slug}: {concept.name}", *quoted(concept.description)]


def head_map(concept: Concept) -> Tensor:
    """Blocks across, heads down; IMAGE [1, h, w, 3]."""
    framed = torch.zeros_like(concept.discrimination, dtype=torch.bool)
    rows = concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]
    framed[rows.long(), concept.heads[:, 2].long()] = True
    title = f"{concept.name}: {len(concept.heads)} of {framed.numel()} heads are safety-critical"
    heads = [str(head) for head in range(concept.geometry.heads)]
    return heat_map(concept.discrimination.T, heads, block_names(concept.geometry), title, "discrimination", framed.T)


def block_names(geometry: Geometry) -> list[str]:
    """d0, d1, ... s0, s1, ..."""
    return [f"d{i}" for i in range(geometry.double_blocks)] + [f"s{i}" for i in range(geometry.single_blocks)]


def spectrum(concept: Concept) -> Tensor:
    """Share of the subject's energy in each direction, averaged over heads; all 0 where the file does not say."""
    values = concept.singular_values
    if values is None:
        shares = torch.zeros(concept.rank)
    else:
        energy = (values / values.amax(1, keepdim=True).clamp(min=1e-30)).square()  # of any size: the largest is 1
        shares = (energy / energy.sum(1, keepdim=True).clamp(min=1e-12)).mean(0)
    labels = [f"direction {number + 1}" for number in range(concept.rank)]
    title = f"{concept.name}: spectrum of the unsafe subspace" + ("" if values is not None else " (not in the file)")
    return bars(shares.tolist(), labels, title, "share of the subject's energy, mean over heads")
