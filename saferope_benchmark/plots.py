"""Figures of comparisons: erasure against damage, matrices, courses. Written as PNG by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saferope_training.plots import save, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """A method at a strength: its unsafe rate against its benign damage, both in [0, 1]."""

    panel: str
    method: str
    strength: float | None
    unsafe: float
    interval: tuple[float, float] | None
    damage: float


def pareto(path: Path, points: Sequence[Point], damage: str) -> None:
    """Unsafe rate (up) against benign damage (along), a panel a concept, a line a method; lower left is better."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point.panel for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns + 1.6, 4.2 * rows), dpi=120, layout="constrained")
    handles = {}
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for index, method in enumerate(methods):
            own = [point for point in points if (point.panel, point.method) == (panel, method)]
            if own:
                handles[method] = _front(axes, sorted(own, key=lambda p: p.strength or 0), index)
        most = max([100 * point.damage for point in points if point.panel == panel] + [_LEAST])
        limits = {"xlim": (-0.08 * most, 1.05 * most), "ylim": (-6, 108)}
        axes.set(xlabel=words(damage), ylabel="concept shown, %", title=words(panel), **limits)
        axes.grid(alpha=0.25)
    figure.legend(
        handles.values(), [words(each) for each in handles], loc="outside right upper", frameon=False, fontsize=9
    )
    save(figure, path)


_MARKS = "osD^vP*X<>hp"
_ASIDE = 3  # points between methods that meet
_LEAST = 2.0  # percent of damage that an axis shows at least


def _front(axes: Axes, points: Sequence[Point], index: int) -> Any:
    """One method's points, joined in the order of strength, with Wilson's intervals; returns the legend's entry.

    Methods that meet in a point stand side by side; the weakest and the strongest point say their strength.
    """
    from matplotlib.transforms import ScaledTranslation

    aside = ScaledTranslation((index % 10 - 4.5) * _ASIDE / 72, 0, axes.figure.dpi_scale_trans)
    look: dict[str, Any] = {"color": f"C{index % 10}", "transform": axes.transData + aside}
    along, up = [100 * p.damage for p in points], [100 * p.unsafe for p in points]
    for point, x in zip(points, along, strict=True):
        if point.interval:
            axes.plot((x, x), [100 * end for end in point.interval], **look, alpha=0.25, linewidth=1.5)
    for end in {0, len(points) - 1}:
        if points[end].strength is not None:
            x, y = along[end], up[end]
            above = 4 if y < 50 else -9
            strength = axes.annotate(
                f"{points[end].strength:g}",
                (x, y),
                (0, above),
                xycoords=look["transform"],
                textcoords="offset points",
                fontsize=5,
                ha="center",
                color=look["color"],
            )
            strength.set_in_layout(False)
    (line,) = axes.plot(along, up, **look, marker=_MARKS[index % len(_MARKS)], markersize=4, linewidth=0.8)
    return line


def matrix(path: Path, values: Tensor, rows: Sequence[str], columns: Sequence[str], label: str) -> None:
    """Percentages [rows, columns] as a map with the numbers in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(columns) + 2.6, 0.5 * len(rows) + 1.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True
    ):
        dark = value < 50
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [words(each) for each in columns])
    axes.set_yticks(range(len(rows)), [words(each) for each in rows])
    axes.set_xlabel("what the prompts ask for")
    figure.colorbar(image, label=words(label))
    save(figure, path)


def curves(
    path: Path, panels: dict[str, dict[str, Sequence[tuple[float, float]]]], along: str, up: str, doubling: bool = False
) -> None:
    """Shares in [0, 1] over something that grows: a panel for each name, a line for each label.

    `doubling`: the numbers along are 0 and powers of two, each as far from the next.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure = Figure(figsize=(3.4 * len(panels) + 2.2, 3.6), dpi=120, layout="constrained")
    handles = {}
    for number, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for label, points in lines.items():
            x, y = zip(*points, strict=True)
            index = labels.index(label)
            style: dict[str, Any] = {
                "marker": _MARKS[index % len(_MARKS)],
                "markersize": 5 if doubling else 3,
                "color": f"C{index % 10}",
            }
            (handles[label],) = axes.plot(x, [100 * share for share in y], linewidth=1, **style)
        if doubling:
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xticks(x, [f"{place:g}" for place in x])
        axes.set(title=words(name), ylim=(-4, 104), ylabel="" if number else words(up))
        axes.grid(alpha=0.25)
    figure.supxlabel(words(along), fontsize=9)
    figure.legend(
        handles.values(), [words(each) for each in handles], loc="outside right upper", frameon=False, fontsize=8
    )
    save(figure, path)
