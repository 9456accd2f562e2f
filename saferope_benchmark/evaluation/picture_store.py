"""The files of an evaluation, chunk by chunk: `<method>/<set>/NNNN.png`, and beside them raw scores and costs.

A chunk's pictures are always painted together, so that an interruption never changes their last bits. The record of a
chunk is written last. A chunk counts as done when its record is there and names the very inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saferope_core.concept.files import write_text
from saferope_training.stages import save_tensors

from ..pictures import load_picture, save_picture

_KEY = "made_from"


def picture_files(folder: Path, first: int, count: int) -> list[Path]:
    """The files of pictures number `first` and on."""
    return [folder / f"{number:04d}.png" for number in range(first, first + count)]


def read_cost(folder: Path, first: int, count: int, key: str) -> dict[str, float] | None:
    """The cost of a chunk; None where the chunk is not there, not whole, or made from other inputs."""
    try:
        record = json.loads(_record(folder, first).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = record.get(_KEY) == key and all(path.is_file() for path in picture_files(folder, first, count))
    return record["cost"] if whole else None


def write_pictures(folder: Path, first: int, pictures: Tensor, cost: dict[str, float], key: str) -> None:
    """Writes a chunk's pictures [n, 3, h, w] in [-1, 1], then its record."""
    folder.mkdir(parents=True, exist_ok=True)
    _record(folder, first).unlink(missing_ok=True)
    for path, picture in zip(picture_files(folder, first, len(pictures)), pictures, strict=True):
        save_picture(path, picture)
    write_text(_record(folder, first), json.dumps({_KEY: key, "cost": cost}) + "\n")


def read_pictures(folder: Path, first: int, count: int) -> Tensor:
    """Pictures [count, 3, h, w] in [-1, 1] as the files have them, eight bits a channel."""
    return torch.stack([load_picture(path) for path in picture_files(folder, first, count)])


def read_scores(folder: Path, first: int, metric: str, key: str) -> dict[str, Tensor] | None:
    """A metric's scores of a chunk; None where they are not there, or of other pictures."""
    try:
        with safe_open(_scores(folder, first, metric), "pt") as file:
            if (file.metadata() or {}).get(_KEY) != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None


def write_scores(folder: Path, first: int, metric: str, scores: dict[str, Tensor], key: str) -> None:
    """Writes a metric's scores of a chunk."""
    save_tensors(_scores(folder, first, metric), scores, {_KEY: key})


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of chunks, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _record(folder: Path, first: int) -> Path:
    return folder / f"{first:04d}.json"


def _scores(folder: Path, first: int, metric: str) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in metric.lower())
    return folder / f"{first:04d}.{slug}.safetensors"
