"""The picture of a workflow that no machine of ours can run: its nodes in their order, and what protects on the way."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN = 512, 16
PAPER, INK, FAINT, EDGE = (24, 25, 29), (240, 240, 244), (168, 170, 180), (110, 112, 122)
OURS, BOX, ARROW = (183, 154, 216), 58, 22
TOP, LEFT, BESIDE = 80, (MARGIN, 316), (340, SIZE - MARGIN)
WAY = {  # of a picture: title where the workflow has none, and the place of the widget that is told
    "UNETLoader": ("Load Diffusion Model", 0, ""),
    "SafeRoPE_Apply": ("SafeRoPE Apply", 0, "strength "),
    "KSampler": ("KSampler", 2, "steps "),
    "VAEDecode": ("VAE Decode", None, ""),
    "SaveImage": ("Save Image", None, ""),
}
ASIDE = {"SafeRoPE_Apply": ["SafeRoPE_LoadConcept"], "KSampler": ["LoadImage", "CLIPTextEncode"]}


def diagram(workflow: dict, title: str) -> Image.Image:
    """`workflow`: as the editor saves it, with one node of each kind in WAY."""
    sheet = Image.new("RGB", (SIZE, SIZE), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(34))
    nodes = {node["type"]: node for node in reversed(workflow["nodes"])}
    for number, (kind, (name, place, before)) in enumerate(WAY.items()):
        top = TOP + number * (BOX + ARROW)
        node, middle = nodes[kind], sum(LEFT) // 2
        if number:
            _arrow(pen, (middle, top - ARROW), (middle, top))
        told = "" if place is None else f"{before}{node['widgets_values'][place]}"
        _box(pen, node, (LEFT[0], top, LEFT[1], top + BOX), (node.get("title") or name, told))
        for other in [nodes[each] for each in ASIDE.get(kind, []) if each in nodes][:1]:
            _arrow(pen, (BESIDE[0], top + BOX // 2), (LEFT[1], top + BOX // 2))
            said = "" if other["type"] == "CLIPTextEncode" else other["widgets_values"][0]
            _box(pen, other, (BESIDE[0], top, BESIDE[1], top + BOX), (other["title"], said))
    said = "a diagram:\nbring your own\nFLUX files"
    pen.text((BESIDE[0], SIZE - MARGIN), said, FAINT, ImageFont.load_default(18), anchor="ld")
    return sheet


def _box(pen: ImageDraw.ImageDraw, node: dict, box: tuple[int, int, int, int], lines: tuple[str, str]) -> None:
    left, top, right, _ = box
    edge = OURS if node["type"].startswith("SafeRoPE") else EDGE
    pen.rounded_rectangle(box, 8, node.get("bgcolor", "#2b2c33"), edge, 2)
    name, told = lines
    pen.text((left + 10, top + (8 if told else 19)), name, INK, _fitting(pen, name, 18, right - left - 20))
    pen.text((left + 10, top + 33), told, FAINT if edge == EDGE else INK, _fitting(pen, told, 15, right - left - 20))


def _fitting(pen: ImageDraw.ImageDraw, text: str, size: int, room: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The largest font up to `size` in which a line fits."""
    while size > 8 and pen.textlength(text, ImageFont.load_default(size)) > room:
        size -= 1
    return ImageFont.load_default(size)


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    """Downwards or to the left."""
    x, y = end
    pen.line((*start, *end), FAINT, 3)
    wings = [(x - 6, y - 8), (x + 6, y - 8)] if start[0] == x else [(x + 8, y - 6), (x + 8, y + 6)]
    pen.polygon([end, *wings], FAINT)
