"""The demo: train a concept for the tiny world, run the bundled workflow in a real ComfyUI without and with it,
compare.

    make demo        # or: python -m dev.demo

Writes demo_output/comparison.png (prompt, unprotected, protected) and demo_output/results.md. Pictures of an earlier
run from the same prompts, weights and concept file are used again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor

from saferope_benchmark.scores.metrics import pixel_difference, wilson_interval
from saferope_core import sha256
from tinyworld.detector import accuracy, load_detector, shows
from tinyworld.world import Prompt, benign_prompts, unsafe_prompts

from .comfyui import ROOT, ComfyUI
from .estimate import demo_seconds, in_words, measure_passes
from .workflow import BUNDLED, api_prompt, fill

OUT = ROOT / "demo_output"
SLUG = "star"
CONCEPT = OUT / SLUG / f"{SLUG}.safetensors"
SEED = 2026
UNSAFE, HELD_OUT, BENIGN = 32, 16, 32
SHOWN = {"unsafe": 3, "unsafe, held-out words": 3, "benign": 6}  # rows of the picture, the first of each kind
SIDES = ("unprotected", "protected")  # in the order of the workflow's pictures

TILE, TEXT, MARGIN = 192, 230, 14  # pixels of the comparison
INK, PALE, RED, GREEN = (30, 30, 35), (250, 250, 250), (190, 30, 40), (20, 120, 70)


class Shot(NamedTuple):
    """A prompt, its kind, and the seed of its picture."""

    kind: str
    prompt: Prompt
    seed: int


def shots() -> list[Shot]:
    """All prompts of the demo: combinations of shape, colour, background and place that the model has never seen."""
    kinds = {
        "unsafe": unsafe_prompts(SLUG, UNSAFE, SEED, test=True),
        "unsafe, held-out words": unsafe_prompts(SLUG, HELD_OUT, SEED, held_out=True, test=True),
        "benign": benign_prompts(SLUG, BENIGN, SEED, test=True),
    }
    flat = [(kind, prompt) for kind, prompts in kinds.items() for prompt in prompts]
    return [Shot(kind, prompt, SEED + index) for index, (kind, prompt) in enumerate(flat)]


def foretell(todo: list[Shot]) -> str:
    """How long this run takes on this machine, measured in its first seconds."""
    trained = CONCEPT.exists()
    left = _missing(_folder(CONCEPT), todo) if trained else todo
    return in_words(demo_seconds(measure_passes(), len(SIDES) * len(left), trained))


def train() -> Path:
    """The concept file, by the command a user would type. Its stages are reused by the command itself."""
    place = ["--out", str(CONCEPT.parent)]
    command = [sys.executable, "-m", "saferope", "train", SLUG, "--model", "tinyworld", *place, "--no-verdict"]
    subprocess.run(command, cwd=ROOT, check=True)
    return CONCEPT


def draw(concept: Path, todo: list[Shot]) -> dict[str, list[Image.Image]]:
    """The pictures of both sides, from the bundled workflow in a real ComfyUI; kept in OUT and used again."""
    folder = _folder(concept)
    missing = _missing(folder, todo)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
            name = server.add_concept(concept)
            graph = api_prompt(json.loads(BUNDLED.read_text()), server.object_info())
            for shot in track(missing, "ComfyUI draws", console=Console(stderr=True)):
                filled = fill(graph, shot.prompt.text, shot.seed, name, strength=1.0)
                for side, reference in zip(SIDES, server.references(server.run(filled)), strict=True):
                    # as ComfyUI saved it: dropped onto its page, the picture opens its workflow
                    _file(folder, side, shot).write_bytes(server.file(reference))
    return {side: [Image.open(_file(folder, side, shot)).convert("RGB") for shot in todo] for side in SIDES}


def _folder(concept: Path) -> Path:
    return OUT / "pictures" / _fingerprint(concept)


def _missing(folder: Path, todo: list[Shot]) -> list[Shot]:
    """The shots of which a side is still to be drawn."""
    return [shot for shot in todo if not all(_file(folder, side, shot).exists() for side in SIDES)]


def _file(folder: Path, side: str, shot: Shot) -> Path:
    return folder / f"{shot.seed - SEED:03d}_{side}.png"


def _fingerprint(concept: Path) -> str:
    """Changes with anything that decides a picture: the concept, the weights, the workflow, the prompts, our code."""
    weights = ROOT / "tinyworld" / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    code = sorted([*ROOT.glob("saferope_core/*.py"), *ROOT.glob("nodes/*.py"), *ROOT.glob("tinyworld/*.py")])
    parts = [sha256(path) for path in (concept, weights, BUNDLED, *code)] + [repr(shots())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """[n, 3, h, w] in [-1, 1]."""
    rows = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in pictures]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1


def table(todo: list[Shot], drawn: dict[str, list[Image.Image]]) -> str:
    """Unsafe rates with Wilson's 95 % intervals and benign fidelity, as Markdown."""
    detector, sides = load_detector(), {side: pixels(pictures) for side, pictures in drawn.items()}
    lines = ["| what | n | unprotected | protected |", "|---|---|---|---|"]
    for kind in SHOWN:
        chosen = [index for index, shot in enumerate(todo) if shot.kind == kind]
        some = {side: pictures[chosen] for side, pictures in sides.items()}
        if kind != "benign":
            cells = [_rate(shows(detector, pictures, SLUG)) for pictures in some.values()]
            lines.append(f"| {SLUG} shown, {kind} prompts | {len(chosen)} | " + " | ".join(cells) + " |")
            continue
        right = [accuracy(detector, pictures, [todo[i].prompt.scene for i in chosen]) for pictures in some.values()]
        for field in right[0]:
            cells = [f"{100 * side[field]:.1f} %" for side in right]
            lines.append(f"| {field} right, benign prompts | {len(chosen)} | " + " | ".join(cells) + " |")
        change = pixel_difference(*some.values())
        lines.append(f"| mean change of benign pictures, of 255 | {len(chosen)} | 0 | {change:.2f} |")
    return "\n".join(lines) + "\n"


def _rate(hits: Tensor) -> str:
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return f"{100 * hits.float().mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def comparison(todo: list[Shot], drawn: dict[str, list[Image.Image]]) -> Image.Image:
    """Two columns of prompt, unprotected, protected: prompts that ask for the concept, and prompts that do not."""
    unsafe = [i for kind in SHOWN if kind != "benign" for i in _first(todo, kind)]
    columns = (("asks for a star", unsafe, RED), ("asks for something else", _first(todo, "benign"), GREEN))
    width, head = TEXT + 2 * TILE + 4 * MARGIN, 58
    sheet = Image.new("RGB", (2 * width, head + len(unsafe) * (TILE + MARGIN) + MARGIN), PALE)
    pen = ImageDraw.Draw(sheet)
    for column, (title, rows, color) in enumerate(columns):
        left = column * width + MARGIN
        pen.text((left, 20), title, color, ImageFont.load_default(19))
        for place, side in enumerate(SIDES):
            pen.text((left + TEXT + place * (TILE + MARGIN), 20), side, INK, ImageFont.load_default(19))
        for row, index in enumerate(rows):
            top = head + row * (TILE + MARGIN)
            pen.multiline_text((left, top + 20), _label(todo[index], pen), INK, ImageFont.load_default(16), spacing=6)
            for place, side in enumerate(SIDES):
                tile = drawn[side][index].resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left + TEXT + place * (TILE + MARGIN), top))
    return sheet


def _first(todo: list[Shot], kind: str) -> list[int]:
    return [index for index, shot in enumerate(todo) if shot.kind == kind][: SHOWN[kind]]


def _label(shot: Shot, pen: ImageDraw.ImageDraw) -> str:
    """The prompt, broken into lines that fit beside the pictures."""
    font, lines = ImageFont.load_default(16), [""]
    for word in shot.prompt.text.replace(" ,", ",").split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > TEXT - MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def main() -> None:
    start, console = time.monotonic(), Console()
    todo = shots()
    console.print(f"This takes about {foretell(todo)} on this machine, if nothing else runs.")
    concept = train()
    drawn = draw(concept, todo)
    results = table(todo, drawn)
    comparison(todo, drawn).save(OUT / "comparison.png", optimize=True)
    (OUT / "results.md").write_text(results)
    console.print(Markdown(results))
    shown = [OUT / "comparison.png", OUT / "results.md", concept]
    console.print(*(f"{path.relative_to(ROOT)}" for path in shown), f"in {time.monotonic() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
