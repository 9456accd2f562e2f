"""The pictures by which ComfyUI's template browser shows the workflows: squares, 512 pixels wide.

Those of the embedded model are what the workflows really paint. Real FLUX is not here: its workflows show what is joined to what.
"""

from __future__ import annotations

import copy

from PIL import Image, ImageDraw, ImageFont

from ..comfyui import ComfyUI
from ..workflow import api_prompt, change, links_of
from .tiny import HARMLESS

SIZE, MARGIN, LINE = 512, 16, 22
PAPER, INK, FAINT, SHADOW = (250, 250, 250), (30, 30, 35), (110, 110, 118), (38, 38, 44)
BOX, ARROW = 58, 22  # a box of the diagram, and the room for the arrow below it
CHAIN = ("MODEL", "LATENT", "IMAGE")  # what is followed from the loader to the saved picture
TOLD = ("unet_name", "steps", "concept", "strength", "image")  # the widget that a box shows, the first it has
BESIDE = {
    "SafeRoPE_Apply": ("SafeRoPE_LoadConcept",),
    "KSampler": ("LoadImage", "CLIPTextEncode"),
}  # the first there is

Tile = tuple[str, Image.Image]


class Run:
    """One run of a workflow: its pictures by the titles of the nodes that show them."""

    def __init__(self, server: ComfyUI, graph: dict):
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
    run = Run(server, graph)
    words, places, heads = (
        ("", *run.pictures(title)) for title in ("Which words", "Where in the picture", "Which heads")
    )
    return card("What was suppressed, and where?", [[words], [places, heads]])


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
    top += max(0, SIZE - MARGIN - top - sum(wanted)) // 3  # a little above the middle
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


def diagram(workflow: dict, title: str) -> Image.Image:
    """The way from the loader to the saved picture, box by box, in the nodes' own colours, and what protects on the way."""
    sheet = Image.new("RGB", (SIZE, SIZE), SHADOW)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, PAPER, ImageFont.load_default(34))
    top, links, nodes = 76, links_of(workflow), {node["id"]: node for node in workflow["nodes"]}
    for number, node in enumerate(chain(workflow, links, nodes)):
        if number:
            _arrow(pen, (166, top - ARROW), (166, top))
        _box(pen, node, (MARGIN, top, 316, top + BOX))
        for beside in [n for kind in BESIDE.get(node["type"], ()) for n in workflow["nodes"] if n["type"] == kind][:1]:
            _arrow(pen, (340, top + BOX // 2), (316, top + BOX // 2))
            _box(pen, beside, (340, top, SIZE - MARGIN, top + BOX))
        top += BOX + ARROW
    pen.text(
        (340, SIZE - MARGIN),
        "a diagram:\nbring your own\nFLUX files",
        (170, 170, 178),
        ImageFont.load_default(18),
        anchor="ld",
    )
    return sheet


def chain(workflow: dict, links: dict, nodes: dict) -> list[dict]:
    """The nodes from the model's loader along model, latent and image to the end."""
    found = [next(node for node in workflow["nodes"] if node["type"] == "UNETLoader")]
    while True:
        ahead = [n for out in found[-1]["outputs"] if out["type"] in CHAIN for n in out["links"]]
        if not ahead:
            return found
        found.append(nodes[links[ahead[0]].target])


def _box(pen: ImageDraw.ImageDraw, node: dict, box: tuple[int, int, int, int]) -> None:
    slots = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    fill, edge = node.get("bgcolor", "#3a3a42"), "#b79ad8" if node["type"].startswith("SafeRoPE") else "#77777f"
    pen.rounded_rectangle(box, 8, fill, edge, 2)
    name = node.get("title") or {"UNETLoader": "Load Diffusion Model", "VAEDecode": "VAE Decode"}.get(
        node["type"], node["type"]
    )
    told = next((i for wanted in TOLD for i, slot in enumerate(slots) if slot == wanted), None)
    value = "" if told is None else _told(node, slots[told])
    small = 15 if box[2] - box[0] < 200 else 18
    pen.text((box[0] + 10, box[1] + (8 if value else 18)), name, PAPER, ImageFont.load_default(small + 1))
    pen.text((box[0] + 10, box[1] + 33), value, (205, 205, 212), ImageFont.load_default(small - 3))


def _told(node: dict, widget: str) -> str:
    """A widget's value; a seed's companion has a value but no slot, so that places differ behind it."""
    names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    behind = names.index(widget) + ("seed" in names[: names.index(widget)])
    value = node["widgets_values"][behind]
    return f"{widget} {value}" if not isinstance(value, str) else value


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    pen.line((*start, *end), (190, 190, 198), 3)
    x, y = end
    back, side = (0, -8) if start[0] == end[0] else (8, 0), 6
    wings = (
        [(x - side, y + back[1]), (x + side, y + back[1])]
        if back[1]
        else [(x + back[0], y - side), (x + back[0], y + side)]
    )
    pen.polygon([end, *wings], (190, 190, 198))


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
}
DRAWN = {
    "SafeRoPE FLUX.1-dev": "FLUX.1-dev",
    "SafeRoPE FLUX.1-schnell": "FLUX.1-schnell",
    "SafeRoPE FLUX.1 Kontext edit": "FLUX.1 Kontext, editing",
}


def thumbnail(server: ComfyUI, name: str, workflow: dict) -> Image.Image:
    if name in DRAWN:
        return diagram(workflow, DRAWN[name])
    return PAINTED[name](server, api_prompt(workflow, server.object_info()))
