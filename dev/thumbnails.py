"""Draws the pictures by which ComfyUI's template browser shows the workflows, with the embedded model or as diagrams.

python -m dev.thumbnails                       # about a minute on two CPU cores
python -m dev.thumbnails "SafeRoPE risk map"   # this one alone
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .comfyui import ComfyUI
from .diagram import diagram
from .workflow import EXAMPLES, api_prompt, change, in_tiny_world

SIZE, MARGIN, LINE = 512, 16, 22
PAPER, INK, FAINT = (24, 25, 29), (240, 240, 244), (168, 170, 180)  # as the nodes' own cards
QUALITY = 88  # of the JPEGs
HARMLESS = "a blue circle in the center on a pink background"

Tile = tuple[str, Image.Image]


class Run:
    """One run of a workflow: its pictures by the titles of the nodes that show them."""

    def __init__(self, server: ComfyUI, graph: dict) -> None:
        self.server, self.graph, self.outputs = server, graph, server.run(graph)

    def pictures(self, title: str) -> list[Image.Image]:
        (node,) = (number for number, node in self.graph.items() if node["_meta"]["title"] == title)
        return [self.server.image(reference) for reference in self.outputs[node]["images"]]


def tiny_world(server: ComfyUI, graph: dict) -> Image.Image:
    run = Run(server, graph)
    tiles = [(title.lower(), *run.pictures(title)) for title in ("Unprotected", "Protected")]
    return card(prompt_of(graph, "CLIPTextEncode", "text"), [tiles])


def several_concepts(server: ComfyUI, graph: dict) -> Image.Image:
    run = Run(server, graph)
    tiles = [(title.lower(), *run.pictures(title)) for title in ("Unprotected", "Protected from both")]
    return card(prompt_of(graph, "CLIPTextEncode", "text"), [tiles, [("", *run.pictures("Overlap as a map"))]])


def probe_and_refuse(server: ComfyUI, graph: dict) -> Image.Image:
    other = copy.deepcopy(graph)
    change(other, "PrimitiveStringMultiline", value=HARMLESS)
    risky, harmless = Run(server, graph), Run(server, other)
    tiles = [
        (caption, *run.pictures("The answer"))
        for caption, run in (("risky prompt", risky), ("harmless prompt", harmless))
    ]
    return card(
        "Is the prompt risky? One pass tells", [tiles, [("", risky.pictures("How risky is it? One pass tells")[0])]]
    )


def risk_map(server: ComfyUI, graph: dict) -> Image.Image:
    return card("What was suppressed, and where?", [[("", *Run(server, graph).pictures("What was suppressed"))]])


def make_a_concept(server: ComfyUI, graph: dict, what: str = "Make a concept from a preset") -> Image.Image:
    return card(what, [[("", *Run(server, graph).pictures("Before and after"))]])


def app(server: ComfyUI, graph: dict) -> Image.Image:
    run = Run(server, graph)
    tiles = [(title.lower(), *run.pictures(title)) for title in ("Picture", "Verdict")]
    return card("As an app, here with the tiny world", [tiles])


def card(title: str, rows: list[list[Tile]]) -> Image.Image:
    """A title above rows of tiles, each as large as its room lets it be."""
    sheet = Image.new("RGB", (SIZE, SIZE), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for line in broken(title, pen, 22):
        pen.text((MARGIN, top), line, INK, ImageFont.load_default(22))
        top += LINE + 6
    wanted = [max(_height(tiles, tile) for tile in tiles) for tiles in rows]
    room = (SIZE - top - MARGIN) / sum(wanted)
    top += max(0, SIZE - MARGIN - top - sum(wanted)) // 2
    for tiles, height in zip(rows, wanted, strict=True):
        _row(sheet, pen, tiles, top, int(height * min(1, room)))
        top += int(height * min(1, room))
    return sheet


def _width(tiles: list[Tile]) -> int:
    return (SIZE - MARGIN) // len(tiles) - MARGIN


def _height(tiles: list[Tile], tile: Tile) -> int:
    caption, picture = tile
    return round(_width(tiles) * picture.height / picture.width) + (LINE + 6 if caption else 0) + MARGIN


def _row(sheet: Image.Image, pen: ImageDraw.ImageDraw, tiles: list[Tile], top: int, height: int) -> None:
    for place, (caption, picture) in enumerate(tiles):
        left = MARGIN + place * (_width(tiles) + MARGIN)
        head = LINE + 6 if caption else 0
        scale = min(_width(tiles) / picture.width, (height - head - MARGIN) / picture.height)
        size = round(picture.width * scale), round(picture.height * scale)
        left += (_width(tiles) - size[0]) // 2
        pen.text((left, top + 2), caption, FAINT, ImageFont.load_default(18))
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top + head))


def prompt_of(graph: dict, kind: str, name: str) -> str:
    return next(node["inputs"][name] for node in graph.values() if node["class_type"] == kind)


def broken(text: str, pen: ImageDraw.ImageDraw, size: int) -> list[str]:
    """Lines that fit the card."""
    lines = [""]
    for word in text.replace(" ,", ",").split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, ImageFont.load_default(size)) <= SIZE - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


PAINTED = {
    "SafeRoPE tiny world": tiny_world,
    "SafeRoPE several concepts": several_concepts,
    "SafeRoPE probe and refuse": probe_and_refuse,
    "SafeRoPE risk map": risk_map,
    "SafeRoPE make a concept, tiny world": make_a_concept,
    "SafeRoPE make a concept for your FLUX": partial(
        make_a_concept, what="Make a concept for your FLUX, shown in the tiny world"
    ),
    "SafeRoPE Safe FLUX app": app,
}


DRAWN = {
    "SafeRoPE FLUX.1-dev": "FLUX.1-dev",
    "SafeRoPE FLUX.1-schnell": "FLUX.1-schnell",
    "SafeRoPE FLUX.1 Kontext edit": "FLUX.1 Kontext, editing",
}


def save(name: str, picture: Image.Image) -> None:
    picture.save(EXAMPLES / f"{name}.jpg", quality=QUALITY, optimize=True)
    print(EXAMPLES.name, f"{name}.jpg", sep="/")


def read(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def main(wanted: list[str]) -> None:
    for name in [each for each in wanted or DRAWN if each in DRAWN]:
        save(name, diagram(read(name), DRAWN[name]))
    painted = [each for each in wanted or PAINTED if each not in DRAWN]
    if painted:
        paint(painted)


def paint(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
        info = server.object_info()
        for name in names:
            workflow = in_tiny_world(read(name)) if "FLUX" in name else read(name)
            save(name, PAINTED[name](server, api_prompt(workflow, info)))


if __name__ == "__main__":
    main(sys.argv[1:])
