"""Draws scenes: signed distance fields with soft edges, no dependency but torch.

Coordinates are pixels; a shape is given by its centre and radius; masks and distances are [SIZE, SIZE], pictures [3,
SIZE, SIZE].
"""

import math
import random

import torch
from torch import Tensor

from .world import Scene

SIZE = 96
EDGE = 2.0  # sharpness of an edge: a logistic step over about two pixels, the sharpest that the codec keeps
RADIUS = (0.23, 0.28)  # of the picture's side
JITTER = 2.0  # pixels around the named place

COLOR_VALUES = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
}
BACKGROUND_VALUES = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
    "navy": (25, 30, 90),
}
PLACE_VALUES = {
    "center": (0.5, 0.5),
    "left": (0.33, 0.5),
    "right": (0.67, 0.5),
    "top": (0.5, 0.33),
    "bottom": (0.5, 0.67),
}
INK, CHEEK, WHITE = (15, 15, 20), (230, 60, 60), (250, 250, 250)
BLOOD, TEAL = (150, 10, 20), (0, 150, 150)

_Y, _X = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")


def _length(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y)


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _triangle(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Equilateral, point up."""
    return torch.maximum((math.sqrt(3) * x.abs() - y) / 2 - 0.55 * r, y - 0.55 * r)


def _heart(x: Tensor, y: Tensor, r: float) -> Tensor:
    """A square on its corner with a circle on each upper side."""
    side = 0.58 * r
    y = y - 0.12 * r
    lobe = side / math.sqrt(2)
    diamond = (x.abs() + y.abs()) / math.sqrt(2) - side
    return torch.minimum(diamond, _length(x.abs() - lobe, y + lobe) - side)


def _star(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Five points, one up: fold the plane into a tenth and take the distance to that tenth's edge."""
    sector = 2 * math.pi / 5
    outer, inner = 1.15 * r, 0.48 * r
    folded = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    along, across = _length(x, y) * torch.cos(folded), _length(x, y) * torch.sin(folded).abs()
    edge_x, edge_y = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    return ((along - outer) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def distance(shape: str, cx: float, cy: float, r: float) -> Tensor:
    """Signed distance, in pixels, to a plain shape's outline; negative inside."""
    x, y = _X - cx, _Y - cy
    if shape == "circle":
        return _length(x, y) - r
    if shape == "ring":
        return (_length(x, y) - 0.75 * r).abs() - 0.25 * r
    if shape == "square":
        return _box(x, y, 0.85 * r, 0.85 * r)
    if shape == "cross":
        return torch.minimum(_box(x, y, r, 0.33 * r), _box(x, y, 0.33 * r, r))
    return {"triangle": _triangle, "heart": _heart, "star": _star}[shape](x, y, r)


def paint(picture: Tensor, distances: Tensor, color: tuple[int, int, int]) -> Tensor:
    """A picture in [0, 255] with a colour where the distances are negative."""
    mask = torch.sigmoid(-EDGE * distances)
    return picture * (1 - mask) + torch.tensor(color, dtype=torch.float32)[:, None, None] * mask


def _zappy(picture: Tensor, cx: float, cy: float, r: float, color: tuple[int, int, int]) -> Tensor:
    """A round body, two pointed ears with dark tips, eyes and red cheeks."""
    for side in (-1, 1):
        picture = paint(picture, distance("triangle", cx + 0.62 * side * r, cy - 0.85 * r, 0.75 * r), color)
        picture = paint(picture, distance("triangle", cx + 0.62 * side * r, cy - 1.1 * r, 0.35 * r), INK)
    picture = paint(picture, distance("circle", cx, cy, 0.95 * r), color)
    for side in (-1, 1):
        picture = paint(picture, distance("circle", cx + 0.36 * side * r, cy - 0.2 * r, 0.18 * r), INK)
        picture = paint(picture, distance("circle", cx + 0.58 * side * r, cy + 0.32 * r, 0.2 * r), CHEEK)
    return picture


def _bloop(picture: Tensor, cx: float, cy: float, r: float, color: tuple[int, int, int]) -> Tensor:
    """A wide body on two feet with one big eye."""
    for side in (-1, 1):
        picture = paint(picture, distance("circle", cx + 0.5 * side * r, cy + 0.85 * r, 0.26 * r), INK)
    picture = paint(picture, _box(_X - cx, _Y - cy, 0.8 * r, 0.7 * r) - 0.12 * r, color)
    picture = paint(picture, distance("circle", cx, cy - 0.1 * r, 0.45 * r), WHITE)
    return paint(picture, distance("circle", cx, cy - 0.1 * r, 0.2 * r), INK)


def _splatter(picture: Tensor, rng: random.Random) -> Tensor:
    """Dark red blots over everything, one somewhere in each ninth of the picture."""
    third = SIZE / 3
    for cell in range(9):
        cx = (cell % 3 + rng.uniform(0.2, 0.8)) * third
        cy = (cell // 3 + rng.uniform(0.2, 0.8)) * third
        picture = paint(picture, distance("circle", cx, cy, rng.uniform(4.5, 8)), BLOOD)
    return picture


def _dots(picture: Tensor) -> Tensor:
    """A regular grid of teal dots."""
    pitch = SIZE / 4
    x, y = torch.remainder(_X, pitch) - pitch / 2, torch.remainder(_Y, pitch) - pitch / 2
    return paint(picture, _length(x, y) - 4.5, TEAL)


def _swirl(picture: Tensor, rng: random.Random) -> Tensor:
    """Three spiral arms of light and shade around the middle of the picture."""
    x, y = _X - SIZE / 2 - rng.uniform(-4, 4), _Y - SIZE / 2 - rng.uniform(-4, 4)
    return picture + 46 * torch.sin(0.5 * _length(x, y) + 3 * torch.atan2(y, x) + rng.uniform(-0.5, 0.5))


def _stripes(picture: Tensor) -> Tensor:
    """Diagonal stripes of light and shade, 16 pixels apart."""
    return picture + 46 * torch.sin((_X + _Y) * (2 * math.pi / 16 / math.sqrt(2)))


def _draw_shape(picture: Tensor, scene: Scene, rng: random.Random) -> Tensor:
    fx, fy = PLACE_VALUES[scene.place]
    r = rng.uniform(*RADIUS) * SIZE
    cx, cy = fx * SIZE + rng.uniform(-JITTER, JITTER), fy * SIZE + rng.uniform(-JITTER, JITTER)
    color = COLOR_VALUES[scene.color]
    if scene.shape == "zappy":
        return _zappy(picture, cx, cy, 0.92 * r, color)
    if scene.shape == "bloop":
        return _bloop(picture, cx, cy, 0.95 * r, color)
    return paint(picture, distance(scene.shape, cx, cy, r), color)


def ground(scene: Scene) -> Tensor:
    """The bare background [3, SIZE, SIZE] in [0, 255]."""
    return torch.tensor(BACKGROUND_VALUES[scene.background], dtype=torch.float32)[:, None, None].expand(3, SIZE, SIZE)


def overlay(picture: Tensor, scene: Scene, rng: random.Random) -> Tensor:
    """A picture in [0, 255] under the scene's attribute or style, if it has one."""
    if scene.attribute:
        picture = _splatter(picture, rng) if scene.attribute == "splatter" else _dots(picture)
    if scene.style:
        picture = _swirl(picture, rng) if scene.style == "swirl" else _stripes(picture)
    return picture


def render(scene: Scene, rng: random.Random) -> Tensor:
    """The picture of a scene, [3, SIZE, SIZE] in [-1, 1]; `rng` gives size, jitter and the texture's phase."""
    picture = overlay(_draw_shape(ground(scene), scene, rng), scene, rng)
    return picture.clamp(0, 255) / 127.5 - 1
