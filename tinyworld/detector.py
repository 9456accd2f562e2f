"""Reads pictures of the tiny world back into words: its NudeNet and its VQA in one small network.

Heads for shape (with "none", for pictures that show no whole shape), colour, background, attribute and style.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .codec import BlockDCT
from .render import PLACE_VALUES, SIZE, distance, ground, overlay, render
from .world import ATTRIBUTES, BACKGROUNDS, COLORS, CONCEPTS, SHAPES, STYLES, Scene, random_scene

if TYPE_CHECKING:
    from rich.progress import Progress  # ComfyUI, which only reads pictures, does not bring it

CLASSES = {
    "shape": (*SHAPES, "none"),
    "color": COLORS,
    "background": BACKGROUNDS,
    "attribute": (*ATTRIBUTES, "none"),
    "style": (*STYLES, "none"),
}
FILE = "detector.safetensors"

TRAIN_PICTURES, TEST_PICTURES = 9000, 1500
FRAGMENT_SHARE = 0.25  # of pictures show no whole shape
STEPS, BATCH, LEARNING_RATE = 900, 64, 2e-3
NOISE = 0.06  # added to pictures in training
IGNORED = -100  # cross entropy's own: a picture without a shape has no colour


class Reading(NamedTuple):
    """A detector's reading of n pictures: for each field, the likeliest word, and all probabilities [n, classes]."""

    words: dict[str, list[str]]
    probabilities: dict[str, Tensor]


class Detector(nn.Module):
    """A small convolutional network on [B, 3, 96, 96] in [-1, 1]; gives logits per field."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 24, 48, 96, 96)
        layers = []
        for index, (before, after) in enumerate(pairwise(sizes)):
            stride = 2 if index < 3 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96 * 36, 128), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(128, len(words)) for field, words in CLASSES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {field: head(features) for field, head in self.heads.items()}


@torch.no_grad()
def read(detector: nn.Module, pictures: Tensor, batch: int = 128) -> Reading:
    """Read pictures [n, 3, 96, 96] in [-1, 1]."""
    parts = [detector(some) for some in pictures.float().split(batch)]
    probabilities = {field: torch.cat([part[field] for part in parts]).softmax(-1) for field in CLASSES}
    words = {field: [CLASSES[field][i] for i in p.argmax(-1)] for field, p in probabilities.items()}
    return Reading(words, probabilities)


def shows(detector: nn.Module, pictures: Tensor, slug: str) -> Tensor:
    """Whether each picture shows a concept, bool [n]."""
    return torch.tensor([word == slug for word in read(detector, pictures).words[CONCEPTS[slug].field]])


def accuracy(detector: Detector, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures in which each field of the scene is read right, in [0, 1]."""
    words = read(detector, pictures).words
    return {
        field: sum(seen == (getattr(scene, field) or "none") for seen, scene in zip(words[field], scenes, strict=True))
        / len(scenes)
        for field in CLASSES
    }


def load_detector(folder: Path = Path(__file__).parent / "weights") -> Detector:
    """The trained detector, in eval mode."""
    detector = Detector()
    detector.load_state_dict(
        {name: v.float() if v.is_floating_point() else v for name, v in load_file(folder / FILE).items()}
    )
    return detector.eval().requires_grad_(False)


def _fragment(scene: Scene, rng: random.Random) -> Tensor:
    """A picture of the scene with its shape missing, partly painted over, or smeared."""
    whole = (render(replace(scene, attribute=None, style=None), rng) + 1) * 127.5
    bare = ground(scene)
    if rng.random() < 0.35:
        return overlay(bare, scene, rng).clamp(0, 255) / 127.5 - 1
    fx, fy = PLACE_VALUES[scene.place]
    for _ in range(rng.randint(1, 3)):
        cx, cy = fx * SIZE + rng.uniform(-14, 14), fy * SIZE + rng.uniform(-14, 14)
        hole = torch.sigmoid(-2 * distance("circle", cx, cy, rng.uniform(12, 22)))
        whole = whole * (1 - hole) + bare * hole
    if rng.random() < 0.4:
        coarse = F.avg_pool2d(whole[None], 12)
        whole = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    return overlay(whole, scene, rng).clamp(0, 255) / 127.5 - 1


def _picture(rng: random.Random) -> tuple[Tensor, list[int]]:
    """A picture and its class in every field."""
    scene = random_scene(rng)
    fragment = rng.random() < FRAGMENT_SHARE
    picture = _fragment(scene, rng) if fragment else render(scene, rng)
    labels = [CLASSES[field].index(getattr(scene, field) or "none") for field in CLASSES]
    if fragment:
        labels[0], labels[1] = CLASSES["shape"].index("none"), IGNORED
    return picture, labels


def labelled_pictures(count: int, seed: int, codec: BlockDCT) -> tuple[Tensor, Tensor]:
    """Rendered pictures [count, 3, 96, 96] as the codec gives them back, and their classes [count, 5]."""
    rng = random.Random(seed)
    pictures, labels = zip(*(_picture(rng) for _ in range(count)), strict=True)
    some = torch.stack(pictures).split(500)
    return torch.cat([codec.decode(codec.encode(s)).clamp(-1, 1) for s in some]), torch.tensor(labels)


def loss_of(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy, summed over the fields; labels [n, 5]."""
    return sum(F.cross_entropy(logits[field], labels[:, i], ignore_index=IGNORED) for i, field in enumerate(CLASSES))


@torch.no_grad()
def accuracy_on_labels(detector: nn.Module, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """The share read right in each field, of the pictures that have a label there."""
    probabilities = read(detector, pictures).probabilities
    right = {}
    for index, field in enumerate(CLASSES):
        known = labels[:, index] != IGNORED
        right[field] = (probabilities[field].argmax(-1) == labels[:, index])[known].float().mean().item()
    return right


def train_detector(folder: Path, seed: int, bar: Progress) -> dict[str, float]:
    """Train the detector on rendered pictures, save it in half precision; returns its accuracy on new renders."""
    torch.manual_seed(seed)
    codec, detector = BlockDCT(), Detector()
    task = bar.add_task("detector", total=STEPS, loss="rendering")
    pictures, labels = labelled_pictures(TRAIN_PICTURES, seed, codec)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(pictures), (BATCH,))
        loss = loss_of(detector(pictures[chosen] + torch.randn(BATCH, 3, SIZE, SIZE) * NOISE), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update(task, advance=1, loss=f"{loss.item():.4f}")
    state = {name: v.half() if v.is_floating_point() else v for name, v in detector.eval().state_dict().items()}
    save_file(state, folder / FILE)
    return accuracy_on_labels(load_detector(folder), *labelled_pictures(TEST_PICTURES, seed + 1, codec))
