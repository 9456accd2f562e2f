"""A second detector of the tiny world, trained in another way. It checks the readings of the first one.

    python -m tinyworld.second_detector --out tinyworld/weights      # minutes on one core

Another seed, another architecture (patches and pooling over the whole picture, where the first has rows and columns)
and other pictures. A frayed shape keeps its name. A half-drawn one, a blob of no shape, a few blots, rings and waves
are "none". So this detector tells a damaged shape from a thing that only looks like a shape.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .codec import BlockDCT
from .detector import CLASSES, IGNORED, loss_of
from .render import BLOOD, COLOR_VALUES, PLACE_VALUES, SIZE, distance, ground, overlay, paint, render
from .world import Scene, random_scene

FILE = "second_detector.safetensors"
SEED = 4242  # no seed of `tinyworld.train`
PICTURES = 6000
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 600, 48, 3e-3, 0.05
PATCH, WIDTHS = 4, (48, 64, 80)  # pixels of a patch's side; channels
FRAYED, HALF, BLOB = 0.25, 0.15, 0.12  # shares of the pictures
FRAY = (1.0, 4.0)  # pixels that an edge is torn by
FRAY_GRID = (10, 20)  # points a side of the noise that tears: 5 to 10 pixels apart
HALF_LEFT = (-0.15, 0.25)  # of the radius: where the cut runs, from the middle
LOBES = (2, 3, 4, 6, 7)  # of a blob's outline; five would make a star
OTHER_OVERLAY = 0.2  # of pictures without attribute and style have blots or waves that are neither
_XY = torch.stack(torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="xy"))


class SecondDetector(nn.Module):
    """As `detector.Detector`: [B, 3, 96, 96] in [-1, 1] to logits a field; group norm, GELU, mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.features = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            *(nn.Conv2d(3 * PATCH**2, a, 3, padding=1), nn.GroupNorm(8, a), nn.GELU()),
            *(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU()),
            *(nn.Conv2d(b, c, 3, padding=1), nn.GroupNorm(8, c), nn.GELU()),
            *(nn.Conv2d(c, c, 7, padding=3, groups=c), nn.Conv2d(c, c, 1), nn.GroupNorm(8, c), nn.GELU()),
        )
        self.heads = nn.ModuleDict({field: nn.Linear(2 * c, len(words)) for field, words in CLASSES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        maps = self.features(pictures)
        features = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return {field: head(features) for field, head in self.heads.items()}


def load_second_detector(folder: Path = Path(__file__).parent / "weights") -> SecondDetector:
    """The trained second detector, in eval mode."""
    detector = SecondDetector()
    detector.load_state_dict({name: values.float() for name, values in load_file(folder / FILE).items()})
    return detector.eval().requires_grad_(False)


def frayed(picture: Tensor, rng: random.Random) -> Tensor:
    """A picture [3, SIZE, SIZE] whose edges are torn by up to FRAY pixels; the shape can still be named."""
    points, far = rng.randint(*FRAY_GRID), rng.uniform(*FRAY)
    noise = torch.randn(1, 2, points, points, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    torn = _XY + far * F.interpolate(noise, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    grid = (2 * torn / SIZE - 1).permute(1, 2, 0)[None]
    return F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)[0]


def half_drawn(picture: Tensor, scene: Scene, rng: random.Random) -> Tensor:
    """A picture in [0, 255] of which a cut through the shape leaves about half; the rest is background."""
    angle, cut = rng.uniform(0, 2 * math.pi), rng.uniform(*HALF_LEFT) * 0.25 * SIZE
    fx, fy = PLACE_VALUES[scene.place]
    side = (_XY[0] - fx * SIZE) * math.cos(angle) + (_XY[1] - fy * SIZE) * math.sin(angle)
    return torch.where(side > cut, picture, ground(scene))


def blob(scene: Scene, rng: random.Random) -> Tensor:
    """The background with a smooth closed outline of no named shape, in [0, 255]."""
    fx, fy = PLACE_VALUES[scene.place]
    x, y = _XY[0] - fx * SIZE, _XY[1] - fy * SIZE
    turn, radius = torch.atan2(y, x), torch.full((SIZE, SIZE), rng.uniform(0.15, 0.25) * SIZE)
    for lobes in rng.sample(LOBES, 2):
        radius = radius * (1 + rng.uniform(0.12, 0.35) * torch.cos(lobes * turn + rng.uniform(0, 2 * math.pi)))
    return paint(ground(scene), torch.sqrt(x * x + y * y) - radius, COLOR_VALUES[scene.color])


def other_overlay(picture: Tensor, rng: random.Random) -> Tensor:
    """A few blots, rings or waves over a picture in [0, 255]: neither an attribute nor a style of the world."""
    kind = rng.choice(("blots", "rings", "waves"))
    if kind == "blots":
        color = rng.choice((BLOOD, *COLOR_VALUES.values()))
        for _ in range(rng.randint(1, 3)):
            place = (rng.uniform(0.05, 0.95) * SIZE for _ in "xy")
            picture = paint(picture, distance("circle", *place, rng.uniform(3, 7)), color)
        return picture
    x, y = _XY[0] - SIZE / 2, _XY[1] - SIZE / 2
    angle = rng.choice((0, math.pi / 2, -math.pi / 4)) + rng.uniform(-0.3, 0.3)  # stripes run the other way
    along = torch.sqrt(x * x + y * y) if kind == "rings" else x * math.cos(angle) + y * math.sin(angle)
    return picture + rng.uniform(15, 46) * torch.sin(rng.uniform(0.3, 0.6) * along + rng.uniform(0, 6))


def picture_of(scene: Scene, rng: random.Random, form: str = "whole") -> Tensor:
    """The scene in [-1, 1], "whole", "frayed", "half" or "blob"; overlays lie above, untouched."""
    picture = (render(replace(scene, attribute=None, style=None), rng) + 1) * 127.5
    if form == "frayed":
        picture = frayed(picture, rng)
    elif form == "half":
        picture = half_drawn(picture, scene, rng)
    elif form == "blob":
        picture = blob(scene, rng)
    picture = overlay(picture, scene, rng)
    if not (scene.attribute or scene.style) and rng.random() < OTHER_OVERLAY and form != "frayed":
        picture = other_overlay(picture, rng)
    return picture.clamp(0, 255) / 127.5 - 1


def _drawn(rng: random.Random) -> tuple[Tensor, list[int]]:
    scene, draw = random_scene(rng), rng.random()
    forms = {"frayed": FRAYED, "half": FRAYED + HALF, "blob": FRAYED + HALF + BLOB}
    form = next((name for name, below in forms.items() if draw < below), "whole")
    labels = [CLASSES[field].index(getattr(scene, field) or "none") for field in CLASSES]
    if form in ("half", "blob"):
        labels[:2] = [CLASSES["shape"].index("none"), IGNORED]
    return picture_of(scene, rng, form), labels


def hard_pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 96, 96] as the codec gives them back, and their classes [count, 5]."""
    from rich.progress import track  # ComfyUI, which only reads pictures, does not bring it

    rng, codec = random.Random(seed), BlockDCT()
    pictures, labels = zip(*(_drawn(rng) for _ in track(range(count), "pictures")), strict=True)
    parts = torch.stack(pictures).split(500)
    return torch.cat([codec.decode(codec.encode(some)).clamp(-1, 1) for some in parts]), torch.tensor(labels)


def _disturbed(pictures: Tensor) -> Tensor:
    """The pictures with noise, another contrast and brightness, and a shift of up to three pixels."""
    n = len(pictures)
    pictures = pictures * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.16 * (torch.rand(n, 1, 1, 1) - 0.5)
    shift = [int(torch.randint(-3, 4, ())) for _ in "xy"]
    return torch.roll(pictures, shift, (2, 3)) + 0.12 * torch.rand(n, 1, 1, 1) * torch.randn_like(pictures)


def train_second_detector(folder: Path, seed: int = SEED, steps: int = STEPS, count: int = PICTURES) -> None:
    """Train on pictures rendered from `seed`, and save in half precision."""
    from rich.progress import track

    torch.manual_seed(seed)
    pictures, labels = hard_pictures(count, seed)
    detector = SecondDetector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in track(range(steps), "second detector"):
        chosen = torch.randint(count, (BATCH,))
        loss = loss_of(detector(_disturbed(pictures[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: values.half() for name, values in detector.state_dict().items()}, folder / FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the second detector of the tiny world.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    train_second_detector(parser.parse_args().out)


if __name__ == "__main__":
    main()
