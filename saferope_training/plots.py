"""Plots of numbers: the head map, the loss curve, Pareto fronts, matrices, curves. matplotlib without a display.

Texts are shown letter by letter: a concept's name or a file's may hold signs that matplotlib would read as a formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saferope_core import Geometry
from saferope_core.concept.files import placed
from saferope_core.concept.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 80  # characters of a text in a plot
_CELL = (0.22, 0.2)  # inches of a cell of a head map, along and up
_MAP = (13.2, 9.6)  # most inches of all cells together: enough for 60 blocks (Qwen-Image) and 48 heads (FLUX.2-dev)


def words(text: str) -> str:
    """`text` for matplotlib: each line printable and not too long, and every dollar sign a dollar sign."""
    return "\n".join(printable(line, _LONGEST) for line in text.split("\n")).replace("$", r"\$")


def save(figure: Figure, path: Path, **how: Any) -> None:
    """Writes a figure of matplotlib's as PNG: the old file or the new one."""
    with placed(path) as new:
        figure.savefig(new, format="png", **how)


def head_map(path: Path, discrimination: Tensor, geometry: Geometry, critical: Tensor, title: str) -> None:
    """Δ [blocks, H] as a map, blocks along, heads up; a frame marks the safety-critical ones, bool [blocks, H]."""
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    width, height = (min(c * n, most) for c, n, most in zip(_CELL, discrimination.shape, _MAP, strict=True))
    figure = Figure(figsize=(max(5.0, width + 2), max(2.4, height + 1.4)), dpi=120)
    axes = figure.add_subplot()
    image = axes.imshow(discrimination.T.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto", origin="lower")
    corners = torch.tensor([(-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46)])
    # one path for all, which nothing measures: a patch for each takes thousands of them tens of seconds
    outline = Outline.make_compound_path_from_polys((critical.nonzero()[:, None] + corners).numpy())
    frames = axes.add_artist(PathPatch(outline, fill=False, edgecolor="#00a5b5", linewidth=1.2, snap=True))
    frames.set_in_layout(False)
    axes.axvline(geometry.double_blocks - 0.5, color="white", linestyle=":", linewidth=1)
    labels = [f"d{i}" for i in range(geometry.double_blocks)] + [f"s{i}" for i in range(geometry.single_blocks)]
    every = max(1, geometry.blocks // 12)
    axes.set_xticks(range(0, geometry.blocks, every), labels[::every])
    axes.set_yticks(range(0, geometry.heads, max(1, geometry.heads // 8)))
    axes.set(xlabel="block (d double, s single)", ylabel="head", title=words(title))
    figure.colorbar(image, label="discrimination Δ")
    save(figure, path, bbox_inches="tight")


def loss_curve(path: Path, log: Sequence[dict], unlearning: str) -> None:
    """Mean squared velocity differences by step; `unlearning` says how the unsafe prompts' should run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=120)
    axes = figure.add_subplot()
    sides = (
        ("unlearn", f"unsafe prompts: {unlearning}", "#c0392b"),
        ("preserve", "benign: should stay low", "#2471a3"),
    )
    for phase, label, colour in sides:
        entries = [entry for entry in log if entry["phase"] == phase]
        axes.plot([e["step"] for e in entries], [e["velocity_mse"] for e in entries], ".-", label=label, color=colour)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="difference of velocities (mean square)", title="What training came to")
    axes.legend(frameon=False)
    save(figure, path, bbox_inches="tight")
