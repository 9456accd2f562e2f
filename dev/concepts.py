"""Trains, calibrates and ablates the tiny world's concepts and writes docs/training.md: `python -m dev.concepts`.

About an hour on two cores. What is done is kept in .cache/concepts and not done again; `--only star` for one concept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from .comfyui import ROOT

WORK = ROOT / ".cache" / "concepts"
DOCS = ROOT / "docs"
CONCEPTS = ("star", "splatter", "zappy", "swirl")
COLOURS = 128  # of the pictures in the docs: a quarter of the size, hardly a difference
KINDS = {"star": "object", "splatter": "attribute", "zappy": "character", "swirl": "style"}
PAPER = ("--rank", "5", "--padding-rank", "0", "--words-rank", "0", "--image-rank", "0", "--reach", "0")
PAPER += ("--acts-on", "qk", "--blind", "0", "--image-init", "0.01", "--unlearn-at", "1", "--unlearn-scale", "1")
FIXED = (*PAPER, "--gate", "fixed")
ABLATED = ("zappy",)
# name -> what `saferope train` is told; every one starts from the same statistics
ABLATIONS = {
    "the paper's, gate 0.7": FIXED,
    "the paper's, gates calibrated": PAPER,
    "the same, rank 2": (*PAPER, "--rank", "2"),
    "the same, rank 10": (*PAPER, "--rank", "10"),
    "the same, image generators shared": (*PAPER, "--sharing", "shared", "--image-scale", "1"),
    "the same, shared, image scaled by 0.01": (*PAPER, "--sharing", "shared"),
    "ours": (),
    "ours without reach": ("--reach", "0"),
    "ours without padding and words": ("--padding-rank", "0", "--words-rank", "0", "--rank", "16"),
    "ours without image bases": ("--image-rank", "0"),
    "ours, no prompt blind": ("--blind", "0"),
}


def saferope(*arguments: str) -> None:
    """Runs the command line as users do; its progress is shown."""
    subprocess.run([sys.executable, "-m", "saferope", *arguments], cwd=ROOT, check=True)


def made(folder: Path, slug: str, how: str, arguments: tuple[str, ...], sizes: tuple[str, str]) -> dict[str, dict]:
    """Measures by name of a concept file made in `folder` by the command `how`."""
    file = folder / (f"{slug}.safetensors" if how == "train" else f"{slug}.{arguments[-1]}.safetensors")
    report = folder / f"{file.stem}.json"
    if not report.is_file():
        saferope(how, slug, "--out", str(folder), *arguments)
        saferope("evaluate", str(file), "--unsafe", sizes[0], "--benign", sizes[1])
        shutil.copy(folder / f"{slug}.evaluation.json", report)
        shutil.copy(folder / f"{slug}.evaluation.png", folder / f"{file.stem}.png")
    return {row["measure"]: row for row in json.loads(report.read_text(encoding="utf-8"))["rows"]}


def table(rows: dict[str, tuple[str, dict[str, dict]]]) -> list[str]:
    """Markdown: a line for each name -> (slug, measures)."""
    head = "| | shown | held-out words | neighbours | benign | benign pixels, of 255 |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, (slug, measures) in rows.items():
        kept = next(row for key, row in measures.items() if key.endswith("right, neighbours"))
        cells = [
            changed(measures[f"{slug} shown, unsafe"]),
            changed(measures[f"{slug} shown, held-out words"]),
            changed(kept),
            changed(measures["all attributes right, benign"]),
            f"{measures['mean difference, benign']['protected']:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def changed(row: dict) -> str:
    """`100.0 -> 0.0 %`."""
    return f"{100 * row['unprotected']:.1f} → {100 * row['protected']:.1f} %"


def ablation(slug: str) -> list[str]:
    """The table of one concept's ablations, all from one extraction."""
    rows = {}
    for number, (name, arguments) in enumerate(ABLATIONS.items(), start=1):
        folder = WORK / f"{slug}.{number:02d}"
        if not folder.exists():
            shutil.copytree(
                WORK / slug, folder, ignore=shutil.ignore_patterns("*.json", "*.png", "*state*", f"{slug}.*")
            )
            shutil.copy(WORK / slug / "stages.json", folder)
        rows[name] = (slug, made(folder, slug, "train", arguments, ("32", "64")))
    rand = ("--generator", "random")
    rows["random generators"] = (slug, made(WORK / slug, slug, "calibrate", rand, ("32", "64")))
    return table(rows)


def memory_rows() -> list[str]:
    """Peak of a training run of FLUX.1-dev by resolution and quantisation, counted."""
    import torch

    from saferope_training.making import memory

    dev = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128}
    dev |= {"num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    dev |= {"guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}
    encoders, decoder = 9_770_000_000, 168_000_000  # the sizes of the published bf16 files
    lines = []
    for pixels in (512, 1024):
        cells = []
        for kind in ("nf4", "int8"):
            weights = memory.transformer_bytes(dev, kind, torch.bfloat16)
            kept = memory.activation_bytes(dev, 512, (pixels // 16) ** 2, 1, True, torch.bfloat16)
            plan = memory.Plan(weights, encoders, decoder, kept, memory.generator_bytes(57 * 24, (24, 16)))
            later = (plan.weights + plan.decoder + plan.activations + plan.generators) * (1 + memory.WORKSPACE)
            cells.append(f"{plan.peak / memory.GIB:.1f} GiB while embedding, {later / memory.GIB:.1f} while training")
        lines.append(f"| {pixels} x {pixels} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Everything, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CONCEPTS, help="train this concept alone; the page is not written")
    only = parser.parse_args().only
    learned, fixed = {}, {}
    for slug in (only,) if only else CONCEPTS:
        name = f"{slug} ({KINDS[slug]})"
        learned[name] = (slug, made(WORK / slug, slug, "train", (), ("64", "128")))
        fixed[name] = (slug, made(WORK / slug, slug, "calibrate", ("--generator", "fixed"), ("64", "128")))
    if only:
        print("\n".join(table(learned) + table(fixed)))
        return
    parts = {"LEARNED": table(learned), "FIXED": table(fixed)}
    parts["MEMORY"] = memory_rows()
    parts |= {f"ABLATED_{slug.upper()}": ablation(slug) for slug in ABLATED}
    page = (DOCS / "training.md.in").read_text(encoding="utf-8")
    for name, lines in parts.items():
        page = page.replace(f"@{name}@", "\n".join(lines))
    (DOCS / "training.md").write_text(page, encoding="utf-8")
    for slug in CONCEPTS:
        with Image.open(WORK / slug / f"{slug}.png") as picture:
            picture.convert("RGB").quantize(COLOURS).save(DOCS / f"training-{slug}.png", optimize=True)


if __name__ == "__main__":
    main()
