"""Paints prompts without and with protection, and writes the pictures, a grid of pairs and a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from saferope_benchmark.pictures import comparison_grid, save_picture
from saferope_benchmark.sample import sample
from saferope_core import Concept, Forward, Protection, Run
from saferope_core.concept.files import write_text
from saferope_training.flux.attach import Span
from saferope_training.flux.models import Model
from saferope_training.stages import Progress

RECORD, GRID = "pictures.json", "pairs.png"
_IN_GRID = 12  # pairs
_BATCH = 4


def paint(
    model: Model,
    texts: Sequence[str],
    seeds: Sequence[int],
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    out: Path,
    steps: int | None,
    span: tuple[float, float],
    progress: Progress,
) -> None:
    """A picture per prompt and seed as `NNNN.png`, `NNNN.protected.png` beside it where there are concepts.

    `pictures.json` holds prompt, seed and files of each, and for every concept its risk (see RiskMeter).
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(text, seed) for text in texts for seed in seeds]
    total, done = len(jobs) * (2 if concepts else 1), 0
    protection = Protection(concepts, model.geometry, strengths) if concepts else None
    record: list[dict] = []
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress("pictures", done, total)

    for first in range(0, len(jobs), _BATCH):
        some = jobs[first : first + _BATCH]
        prompts, numbers = zip(*some, strict=True)
        sides = [sample(model, prompts, numbers, None, steps, progress=tell, batch=_BATCH)]
        risks: list[dict] = [{}] * len(some)
        if protection is not None:
            meter = RiskMeter(model, protection)
            sides.append(sample(model, prompts, numbers, meter.rotate, steps, span, tell, _BATCH))
            risks = meter.take()[: len(some)] or risks  # a pipeline may have put the second pass into the same batch
        record += _write(out, first, some, sides, risks)
        for row, pictures in zip(rows, sides, strict=False):
            row.extend(pictures)
        write_text(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    labels = ("unprotected", "protected")
    comparison_grid(
        out / GRID, [(label, torch.stack(row[:_IN_GRID])) for label, row in zip(labels, rows, strict=True) if row]
    )


def _write(
    out: Path, first: int, jobs: Sequence[tuple[str, int]], sides: list[Tensor], risks: list[dict]
) -> list[dict]:
    entries = []
    for offset, ((text, seed), risk) in enumerate(zip(jobs, risks, strict=True)):
        names = [f"{first + offset:04d}{suffix}.png" for suffix in ("", ".protected")[: len(sides)]]
        for name, pictures in zip(names, sides, strict=True):
            save_picture(out / name, pictures[offset])
        entries.append({"prompt": text, "seed": seed, "files": names, "risk": risk})
    return entries


class RiskMeter:
    """A visitor that passes q and k on to `protection` and notes the risk of every picture of the batch under way."""

    def __init__(self, model: Model, protection: Protection) -> None:
        self.protection, self.side = protection, model.latent_side // 2
        self.forward: Forward | None = None

    def rotate(self, x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> Tensor:
        """As `Protection.rotate`."""
        if self.forward is None:  # all steps of a batch count as one
            self.forward = Forward(range(len(x)), 1.0, (self.side, self.side))
        return self.protection.rotate(x, role, block_type, block_index, text, image, self.forward)

    def take(self) -> list[dict[str, dict[str, float | None]]]:
        """Returns a record per picture: concept -> stream -> risk of its riskiest token, mean over steps. Starts anew.

        None: not measured, as the concept is off or turns no tokens of the stream.
        """
        if self.forward is None:
            return []
        run = Run(self.protection.geometry)
        run.add(self.forward)
        count, self.forward = len(self.forward.entries), None
        records: list[dict] = [{} for _ in range(count)]
        for number, concept in enumerate(self.protection.concepts):
            for record, found in zip(records, run.readings(number), strict=True):
                streams = {"text": found.tokens, "image": found.patches}
                record[concept.slug] = {
                    stream: None if risks is None else round(risks.max().item(), 4) for stream, risks in streams.items()
                }
        return records
