"""How far each form is from float64: in the vectors that it writes, and how near a gate it may decide otherwise.

The plain form is computed on a CPU as on a GPU: directions in the vectors' dtype, products summed in float32. The fused
form has the same directions and products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saferope_core import Protection, Roles
from saferope_core.run.forms import PACKED, Form, turn_exact, turn_packed
from saferope_core.run.packed import packed

from .rotation import TRAINED, Size, concept_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: tuple[Form, ...] = ("dense", "plain")
BAND = 4e-3  # of LRS, around the gate: four times as far as any form was seen to decide otherwise
# A gate and the LRS at which a vector turns fully: as in the paper's subspace, and where risk is relative
CASES = ((0.3, 1.0), (0.01, 0.02))


def rows() -> Iterator[dict[str, Any]]:
    """A row for each gate, dtype and form."""
    for gate, full in CASES:
        for dtype in DTYPES:
            for form in FORMS:
                case = f"gate {gate:g}, {str(dtype).removeprefix('torch.')}, {form}"
                yield {"case": case, **_errors(form, dtype, gate, full)}


def _errors(form: Form, dtype: torch.dtype, gate: float, full: float) -> dict[str, float]:
    size = Size(heads=8, text=2048, dtype=dtype, **TRAINED)
    concept = concept_of(size)
    each = torch.full((len(concept.heads),), full)
    concept = replace(concept, text=replace(concept.text, full=Roles(each, each)))
    guard = Protection([concept], size.geometry, thresholds=[gate])
    x = _near_the_gate(guard, size, gate).to(dtype)
    plan: Any = guard._plans_for("dense", x)[1, "q", "text"]
    exact = _turned("dense", x.double(), plan, size)
    result = _turned(form, x, plan, size)
    acted, should = (result != x).any(-1), (exact != x).any(-1)
    off, length = (result.double() - exact).norm(dim=-1), x.double().norm(dim=-1)
    same, lrs = acted & should, _lrs(x.double(), plan)
    return {
        "decided otherwise, furthest from the gate in LRS": (lrs - gate).abs()[acted != should].max().item()
        if (acted != should).any()
        else 0.0,
        "error of a turned vector, of its length, worst": (off / length)[same].max().item(),
        "the same, mean": (off / length)[same].mean().item(),
        "change of length, worst": ((result.double().norm(dim=-1) / length)[same] - 1).abs().max().item(),
    }


def _turned(form: Form, x: Tensor, plan: Any, size: Size) -> Tensor:
    if form in PACKED:
        return turn_packed(form, x, x, packed(plan, size.heads, x.dtype, x.device), (0, size.text), None, False)
    return turn_exact(form, x, x, plan, (0, size.text), None, False)


def _lrs(x: Tensor, plan: Any) -> Tensor:
    part = plan.parts[0]
    inside = x @ part.directions.double() @ part.unsafe.double()
    return inside.square().sum(-1) / x.square().sum(-1)


def _near_the_gate(guard: Protection, size: Size, gate: float) -> Tensor:
    """float64 vectors [1, H, L, D] as long as FLUX's, √D, whose LRS is the gate's, give or take BAND."""
    generator = torch.Generator().manual_seed(0)
    basis = guard.concepts[0].basis("q")[..., : size.rank].double()
    share = gate + BAND * torch.linspace(-1, 1, size.text, dtype=torch.float64)[:, None]
    inside = torch.randn(size.heads, size.text, size.rank, generator=generator).double() @ basis.mT
    outside = torch.randn(size.heads, size.text, size.head_dim, generator=generator).double()
    outside -= outside @ basis @ basis.mT
    parts = (each / each.norm(dim=-1, keepdim=True) for each in (inside, outside))
    return size.head_dim**0.5 * sum(s.sqrt() * part for s, part in zip((share, 1 - share), parts, strict=True))[None]
