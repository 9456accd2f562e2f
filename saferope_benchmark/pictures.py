"""Pictures between tensors and files, and grids of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from saferope_core.concept.files import placed
from saferope_training.plots import save, words

if TYPE_CHECKING:
    from PIL import Image


def to_pil(picture: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] as an image of Pillow's, eight bits a channel."""
    from PIL import Image

    pixels = ((picture.cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = rearrange(pixels, "c h w -> h w c").contiguous()
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def save_picture(path: Path, picture: Tensor) -> None:
    """Writes [3, h, w] in [-1, 1] as PNG: the whole file or none."""
    with placed(path) as new:
        to_pil(picture).save(new, format="PNG")


def load_picture(path: Path, side: int | None = None) -> Tensor:
    """A picture file as [3, h, w] in [-1, 1]; with `side`, its middle square scaled to that. OSError if it cannot be
    read.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = file.convert("RGB")
    if side is not None and picture.size != (side, side):
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    height = picture.size[1]
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return rearrange(pixels, "(h w c) -> c h w", h=height, c=3).float() / 127.5 - 1


def comparison_grid(path: Path, rows: Sequence[tuple[str, Tensor]], titles: Sequence[str] = ()) -> None:
    """Labelled rows of pictures [n, 3, h, w] in [-1, 1], one under the other; `titles` stand over the columns."""
    from matplotlib.figure import Figure

    count, size = max(len(pictures) for _, pictures in rows), rows[0][1].shape[-1]
    figure = Figure(figsize=(count * 0.8 + 1.6, len(rows) * 0.86), dpi=max(120, size))
    for line, (label, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(len(rows), count, line * count + column + 1)
            axes.imshow(rearrange(((picture + 1) / 2).clamp(0, 1), "c h w -> h w c").float().numpy())
            axes.set(xticks=[], yticks=[])
            if line == 0 and column < len(titles):
                axes.set_title(words(titles[column]), fontsize=7, loc="left")
            if column == 0:
                axes.set_ylabel(words(label), rotation=0, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(wspace=0.04, hspace=0.06)
    save(figure, path, bbox_inches="tight")
