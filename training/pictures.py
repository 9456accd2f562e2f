"""Pictures of what training made: the head map, the loss curve, rows of generated pictures. matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from saferope_core import Geometry


def head_map(path: Path, discrimination: Tensor, geometry: Geometry, critical: Tensor, title: str) -> None:
    """Δ [blocks, H] as a map, blocks along, heads up; a frame marks the safety-critical ones, bool [blocks, H]."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(max(5.0, 0.22 * geometry.blocks + 2), max(2.4, 0.2 * geometry.heads + 1.4)), dpi=120)
    axes = figure.add_subplot()
    image = axes.imshow(discrimination.T.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row, head in critical.nonzero().tolist():
        axes.add_patch(Rectangle((row - 0.46, head - 0.46), 0.92, 0.92, fill=False, edgecolor="#00a5b5", linewidth=1.2))
    axes.axvline(geometry.double_blocks - 0.5, color="white", linestyle=":", linewidth=1)
    labels = [f"d{i}" for i in range(geometry.double_blocks)] + [f"s{i}" for i in range(geometry.single_blocks)]
    every = max(1, geometry.blocks // 12)
    axes.set_xticks(range(0, geometry.blocks, every), labels[::every])
    axes.set_yticks(range(0, geometry.heads, max(1, geometry.heads // 8)))
    axes.set(xlabel="block (d double, s single)", ylabel="head", title=title)
    figure.colorbar(image, label="discrimination Δ")
    figure.savefig(path, bbox_inches="tight")


def loss_curve(path: Path, log: Sequence[dict]) -> None:
    """How far the rotated velocity is from the base model's, on unsafe prompts (should rise) and benign pictures (should not)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=120)
    axes = figure.add_subplot()
    for phase, label, colour in (
        ("unlearn", "unsafe prompts, t = 1", "#c0392b"),
        ("preserve", "benign, any t", "#2471a3"),
    ):
        entries = [entry for entry in log if entry["phase"] == phase]
        axes.plot([e["step"] for e in entries], [e["velocity_mse"] for e in entries], ".-", label=label, color=colour)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="mean squared velocity change")
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def save_picture(path: Path, picture: Tensor) -> None:
    """Writes [3, h, w] in [-1, 1] as PNG."""
    from PIL import Image

    pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    Image.frombytes("RGB", (width, height), pixels.numpy().tobytes()).save(path)


def comparison_grid(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Labelled rows of pictures [n, 3, h, w] in [-1, 1], one under the other."""
    from matplotlib.figure import Figure

    count, size = max(len(pictures) for _, pictures in rows), rows[0][1].shape[-1]
    figure = Figure(figsize=(count * 0.8 + 1.6, len(rows) * 0.86), dpi=max(120, size))
    for line, (label, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(len(rows), count, line * count + column + 1)
            axes.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).float().numpy())
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(wspace=0.04, hspace=0.06)
    figure.savefig(path, bbox_inches="tight")
