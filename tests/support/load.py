"""A real ComfyUI under load: many prompts with changing concepts and strengths. Is memory flat, are pictures those of a
reference?

    python -m tests.support.load --prompts 200

Prints the server's memory (resident, private) as a slope in KB a prompt over the second half, with its standard error,
and how many pictures differ from those that a fresh server draws of the same prompts, alone and in another order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from dev.comfyui import ComfyUI
from dev.workflow import BUNDLED, api_prompt, fill
from tinyworld.world import benign_prompts, unsafe_prompts

CONCEPTS = ("star", "swirl")  # bundled
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
DIFFERENT = 16  # prompts before they come again: then the pictures must, too


def asks(count: int, strengths: Sequence[float] = STRENGTHS) -> list[tuple[str, int, str, float]]:
    """(prompt, seed, concept file, strength), a new combination at every place until DIFFERENT."""
    texts = [p.text for p in unsafe_prompts("star", DIFFERENT // 2, 1)] + [
        p.text for p in benign_prompts("star", DIFFERENT // 2, 1)
    ]
    one = [
        (texts[i], i, f"{CONCEPTS[i % 2]}.safetensors", strengths[i // 2 % len(strengths)]) for i in range(DIFFERENT)
    ]
    return [one[i % DIFFERENT] for i in range(count)]


def draw(server: ComfyUI, asked: Sequence, seen=lambda: None) -> list[bytes]:
    """The pixels of every prompt's two pictures, unprotected and protected. Nothing comes from the server's cache."""
    graph, drawn = api_prompt(json.loads(BUNDLED.read_text(encoding="utf-8")), server.object_info()), []
    for text, seed, concept, strength in asked:
        pictures = server.images(server.run(fill(graph, text, seed, concept, strength)))
        drawn.append(b"".join(picture.tobytes() for picture in pictures))
        seen()
    return drawn


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Least squares: growth from one value to the next, and its standard error."""
    n, middle, mean = len(values), (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((i - middle) ** 2 for i in range(n))
    growth = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    rest = sum((v - mean - growth * (i - middle)) ** 2 for i, v in enumerate(values))
    return growth, (rest / (n - 2) / spread) ** 0.5


def measure(count: int, strengths: Sequence[float] = STRENGTHS) -> dict:
    """Runs it all; figures by name."""
    asked, memory = asks(count, strengths), []
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
        process, start = psutil.Process(server.process.pid), time.monotonic()
        drawn = draw(server, asked, lambda: memory.append(process.memory_full_info().uss / 1024))
        seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as fresh:
        other = asked[:DIFFERENT][::-1]
        expected = dict(zip(other, draw(fresh, other), strict=True))
    growth, error = slope(memory[len(memory) // 2 :])
    return {
        "prompts": count,
        "seconds": round(seconds),
        "pictures that differ": sum(expected[ask] != pixels for ask, pixels in zip(asked, drawn, strict=True)),
        "different pictures": len(set(drawn)),
        "KB a prompt": round(growth, 1),
        "standard error": round(error, 1),
        "MB at the middle": round(memory[len(memory) // 2] / 1024, 1),
        "MB at the end": round(memory[-1] / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--control", action="store_true", help="all at strength 0: what the host's memory does by itself"
    )
    given = parser.parse_args()
    print(json.dumps(measure(given.prompts, (0.0,) if given.control else STRENGTHS), indent=1))


if __name__ == "__main__":
    main()
