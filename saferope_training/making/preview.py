"""A look at training while it runs: held-out prompts painted with and without the present generators, and measured.

Nothing here is trained on. Noise comes from generators of its own, nothing is written into the rotation, and no
gradient is made, so that a training with previews ends as one without, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..flux.attach import attached
from ..flux.models import Model, Text, encode, seeded_noise, velocity
from ..flux.painting import decode_pictures, paint
from ..prompts import BENIGN, UNSAFE, PromptRecord, side
from ..prompts.instead import replaced, stand_ins
from ..prompts.sources import prompts_for
from ..settings import Settings
from .batch import REPLACE
from .losses import mean_squared_error
from .rotation import TrainableRotation

if TYPE_CHECKING:
    from PIL import Image

EACH = 4  # prompts of a side: a strip that fits a screen
STEPS = 8  # of a painting: half of the tiny world's 16, where its shapes and colours stand already
PASSES = 2 * EACH * STEPS + 2 * EACH  # forward passes of a prompt that a preview takes, measurement included
_SEED = 11_000_003  # apart from the seeds of training and hardening
_TEXT, _EDGE, _GAP, _CELL = 13, 16, 4, 160  # pixels: letters, margin, between pictures, side of a picture at least
_PAPER, _INK, _QUIET = "#1b1d21", "#e8e6e3", "#9aa0a6"


class Reading(NamedTuple):
    """Two numbers about velocities at pure noise.

    - `unsafe_left`: squared difference of unsafe velocities from their target, as a share of the untrained one's.
    - `benign_moved`: mean squared change of benign velocities, whose own variance is about 1.
    """

    unsafe_left: float
    benign_moved: float


class Preview:
    """A fixed set of prompts, with the base model's velocities and pictures. It encodes them: make it before encoders
    are released."""

    def __init__(self, model: Model, records: Sequence[PromptRecord], settings: Settings) -> None:
        self._model, self._settings = model, settings
        self.records = held_out(records, settings)
        self._count = len(side(self.records, UNSAFE))
        self._text = encode(model, [record.text for record in self.records])
        aims = [record.instead if record.instead is not None else record.text for record in self.records]
        self._aims, seed = encode(model, aims), settings.seed + _SEED
        self._seeds = [seed + place for place in range(len(self.records))]
        self._taken_out = torch.tensor([stand_ins([record]) == [""] for record in self.records])
        self._base: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def look(self, rotation: TrainableRotation) -> tuple[Reading, Tensor, Tensor]:
        """The reading, and the pictures [n, 3, h, w] in [-1, 1] without and with the rotation, at strength 1.

        The pictures without it are made at the first look and kept.
        """
        if self._base is None:
            own = self._velocity(self._text)
            self._base = own, self._target(own), self._painted()
        own, target, before = self._base
        rotation.spared = rotation.strengths = None  # as `_gradients` leaves them
        with attached(self._model.transformer, rotation.rotate):
            error, after = mean_squared_error(self._velocity(self._text), target), self._painted()
        start = mean_squared_error(own, target)
        unsafe, benign = error[: self._count], error[self._count :]
        left = unsafe.sum() / start[: self._count].sum().clamp_min(torch.finfo().tiny)
        return Reading(left.item(), benign.mean().item()), before, after

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.records)).split(self._settings.passes_of or len(self.records))

    def _velocity(self, text: Text) -> Tensor:
        """Velocities [n, L, C] at pure noise."""
        noise = seeded_noise(self._model, self._seeds)
        parts = (velocity(self._model, noise[part], torch.ones(len(part)), text.pick(part)) for part in self._parts())
        return torch.cat(list(parts))

    def _target(self, own: Tensor) -> Tensor:
        """The velocities that training aims at, as in `batch.target`; the same with `away`, which has no target."""
        aimed = self._velocity(self._aims)
        beyond = self._settings.beyond if self._settings.objective == REPLACE else 0.0
        further = (beyond * self._taken_out).to(own)[:, None, None]
        return aimed + further * (aimed - own)

    def _painted(self) -> Tensor:
        """Pictures [n, 3, h, w] in [-1, 1], on the CPU, by the pipeline's own sampler in STEPS steps."""
        model, pictures = self._model, []
        for part in self._parts():
            text = self._text.pick(part)
            latents = paint(model, text, seeded_noise(model, [self._seeds[place] for place in part.tolist()]), STEPS)
            pictures += [
                decode_pictures(model, each[None]) for each in latents
            ]  # one by one: a VAE takes the most room
        return torch.cat(pictures)


def held_out(records: Sequence[PromptRecord], settings: Settings) -> list[PromptRecord]:
    """EACH unsafe prompts, then EACH benign ones, of the same source and of another seed, none of `records`.

    Where a file has too few, unsafe prompts exchange their subjects. Where that is too few, as for benign ones, prompts
    of training follow. They start here from noise that training never sees.
    """
    known = {record.text for record in records}
    more = prompts_for(replace(settings, seed=settings.seed + _SEED))
    chosen: list[PromptRecord] = []
    for name in (UNSAFE, BENIGN):
        own = side(records, name)
        offered = [*side(more, name), *(_swapped(own) if name == UNSAFE else ())]
        new = {record.text: record for record in offered if record.text not in known}
        chosen += [*new.values(), *own][:EACH]
    return chosen


def _swapped(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Unsafe prompts, each with the subject of the one before it. `instead` stays as it is."""
    result = []
    for record, other in zip(records, [*records[-1:], *records[:-1]], strict=True):
        assert record.subject is not None and other.subject is not None, "unsafe prompts have their subject marked"
        word, (first, _) = other.text[slice(*other.subject)], record.subject
        text = replaced(record.text, record.subject, word)
        first = text.find(word, max(0, first - 1))  # an article before it may have grown or shrunk by a letter
        result.append(replace(record, text=text, subject=(first, first + len(word)), scene=None, image=None))
    return result


def strip(records: Sequence[PromptRecord], before: Tensor, after: Tensor, caption: str) -> Image.Image:
    """The pictures without the rotation above those with it, unsafe prompts left of benign ones, under their texts."""
    from PIL import Image, ImageDraw, ImageFont

    from saferope_core.concept.untrusted import printable

    cell, font = max(_CELL, min(before.shape[-1], 2 * _CELL)), ImageFont.load_default(_TEXT)
    side_gap, left, top = 3 * _GAP, _EDGE + 92, _EDGE + 6 * _TEXT
    count = sum(record.side == UNSAFE for record in records)
    xs = [left + place * (cell + _GAP) + (side_gap if place >= count else 0) for place in range(len(records))]
    sheet = Image.new("RGB", (xs[-1] + cell + _EDGE, top + 2 * cell + _GAP + 2 * _EDGE + _TEXT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_EDGE, _EDGE), printable(caption, len(caption)), _INK, ImageFont.load_default(_TEXT + 3))
    for name, places in ((UNSAFE, xs[:count]), (BENIGN, xs[count:])):
        if places:
            pen.text((places[0], top + 2 * cell + _GAP + _EDGE // 2), f"{name} prompts", _QUIET, font)
    for row, (label, pictures) in enumerate((("unprotected", before), ("protected", after))):
        y = top + row * (cell + _GAP)
        pen.text((left - 10, y + cell / 2), label, _INK, font, anchor="rm")
        for x, picture in zip(xs, pictures, strict=True):
            sheet.paste(_image(picture).resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
    for x, record in zip(xs, records, strict=True):
        lines = _wrapped(printable(record.text, 200), font, cell)
        pen.multiline_text((x, top - 6), "\n".join(lines), _QUIET, font, anchor="ld", spacing=2)
    return sheet


def _image(picture: Tensor) -> Image.Image:
    from PIL import Image

    pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())


def _wrapped(text: str, font: object, width: int, most: int = 3) -> list[str]:
    """Lines no wider than a picture, `most` at most; the rest is cut off with dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:  # type: ignore[attr-defined]
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:most]
    if len(lines) > most:
        shown[-1] += " ..."
    for place, line in enumerate(shown):
        while font.getlength(line) > width:  # type: ignore[attr-defined]
            line = line.removesuffix("...")[:-1] + "..."
        shown[place] = line
    return shown
