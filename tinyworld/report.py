"""Measures the tiny world, as Markdown: the pictures that its model paints on request, and its detector's readings.

    python -m tinyworld.report          # about 3 minutes on 2 CPU cores

Prompts combine shape, colour, background and place in ways that the tiny FLUX was never shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffusers import FluxPipeline
from rich.console import Console
from rich.progress import track
from torch import nn

from . import world
from .detector import CLASSES, accuracy, accuracy_on_labels, labelled_pictures, load_detector, shows
from .model import generate, load_pipeline

SEED = 777  # no seed of `tinyworld.train`
CONCEPT_PICTURES, BENIGN_PICTURES, RENDERS = 48, 128, 1500


def concept_rows(pipeline: FluxPipeline, detector: nn.Module) -> list[Sequence[str]]:
    """Per concept the share of pictures that show it: asked for in words, in held-out words, by the pooled vector
    alone.
    """
    rows = []
    for slug in track(world.CONCEPTS, "concepts", console=Console(stderr=True)):
        main, held_out = (world.unsafe_prompts(slug, CONCEPT_PICTURES, SEED, h, test=True) for h in (False, True))
        asked = [[prompt.text for prompt in prompts] for prompts in (main, held_out, main)]
        emptied = [None, None, [""] * CONCEPT_PICTURES]
        seeds = range(SEED, SEED + CONCEPT_PICTURES)
        pictures = [generate(pipeline, texts, seeds, t5_texts=t5) for texts, t5 in zip(asked, emptied, strict=True)]
        rows.append([slug, *(percent(shows(detector, some, slug).float().mean().item()) for some in pictures)])
    return rows


def benign_row(pipeline: FluxPipeline, detector: nn.Module) -> list[str]:
    """Share of pictures of benign prompts in which each field of the scene is as asked for."""
    prompts = world.benign_prompts("star", BENIGN_PICTURES, SEED, test=True)
    pictures = generate(pipeline, [prompt.text for prompt in prompts], range(SEED, SEED + BENIGN_PICTURES))
    right = accuracy(detector, pictures, [prompt.scene for prompt in prompts])
    return ["painted as asked", *(percent(right[field]) for field in CLASSES)]


def detector_row(pipeline: FluxPipeline, detector: nn.Module) -> list[str]:
    """The detector's accuracy on scenes rendered anew, where the truth is known."""
    right = accuracy_on_labels(detector, *labelled_pictures(RENDERS, SEED, pipeline.vae.codec))
    return ["detector, new renders", *(percent(right[field]) for field in CLASSES)]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    pipeline, detector = load_pipeline(), load_detector()
    head = ("concept", "seen", "seen, held-out words", "seen, pooled vector alone")
    print(table(head, concept_rows(pipeline, detector)), end=f"\n\n{CONCEPT_PICTURES} pictures per cell.\n\n")
    print(table(("share right", *CLASSES), [benign_row(pipeline, detector), detector_row(pipeline, detector)]))
    print(f"\n{BENIGN_PICTURES} benign pictures, {RENDERS} renders; seed {SEED}.")


if __name__ == "__main__":
    main()
