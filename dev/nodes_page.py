"""Writes docs/nodes.md from docs/nodes.md.in: every node and input as a real ComfyUI offers them, and how sharp the
probe is.

    python -m dev.nodes_page        # about two minutes on two cores
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferope_core import Concept, Forward, Protection, Run, load_concepts
from saferope_training.flux.attach import attached
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import Model, encode, seeded_noise, velocity
from tinyworld import world

from .comfyui import ROOT, ComfyUI
from .workflow import api_prompt

PAGE = ROOT / "docs" / "nodes.md"
BUNDLED = ROOT / "tinyworld" / "concepts"
RISK_MAP = ROOT / "example_workflows" / "SafeRoPE risk map.json"
RISK_PICTURES = ("words", "patches", "heads", "steps", "card")
COLOURS = 128
OURS = "SafeRoPE_"
PROMPTS, SEED = 96, 2026
FLAG_ABOVE = 0.4  # the default of SafeRoPE Risk Probe


def node_tables(object_info: dict) -> list[str]:
    """Markdown for every node of ours: its description, then a line for each input and output."""
    nodes = [info for node, info in object_info.items() if node.startswith(OURS)]
    return [line for info in sorted(nodes, key=lambda info: info["display_name"]) for line in _node(info)]


def _node(info: dict) -> list[str]:
    lines = [
        f"### {info['display_name']}",
        "",
        info["description"],
        "",
        "| input | values | meaning |",
        "|---|---|---|",
    ]
    for group, optional in (("required", ""), ("optional", " (optional)")):
        for name, spec in info["input"].get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            lines.append(f"| {name}{optional} | {_values(spec[0], options)} | {options.get('tooltip', '')} |")
    if lines[-1].startswith("|---"):
        lines = lines[:-3]
    lines += ["", "| output | type | meaning |", "|---|---|---|"]
    for name, kind, tip in zip(info["output_name"], info["output"], info["output_tooltips"], strict=True):
        lines.append(f"| {name} | {kind} | {tip} |")
    return [*lines, ""]


def _values(kind: Any, options: dict) -> str:
    """Type or choices, range and default in a few words."""
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options["options"]
        return "a file" if any(str(c).endswith(".safetensors") for c in choices) else " / ".join(choices)
    if kind == "COMFY_AUTOGROW_V3":
        return "one or more"
    parts = [kind]
    if "min" in options and options.get("max", 2**32) < 2**32:
        parts.append(f"{options['min']:g} to {options['max']:g}")
    if (default := options.get("default")) not in (None, ""):
        parts.append(f"default {default:g}" if isinstance(default, float) else f"default {default}")
    return ", ".join(parts)


@torch.no_grad()
def scores(model: Model, concept: Concept, prompts: list[world.Prompt]) -> Tensor:
    """The risk of each prompt from one pass on pure noise, as SafeRoPE Risk Probe takes it, [n]."""
    guard, found = Protection([concept], model.geometry), []
    for first in range(0, len(prompts), 24):
        texts = [prompt.text for prompt in prompts[first : first + 24]]
        side = model.latent_side // 2
        forward, run = Forward(range(len(texts)), 1.0, (side, side)), Run(model.geometry)

        def look(*where: Any, forward: Forward = forward) -> None:
            guard.rotate(*where, seen=forward)

        noise = seeded_noise(model, range(SEED + first, SEED + first + len(texts)))
        with attached(model.transformer, look):
            velocity(model, noise, torch.ones(len(texts)), encode(model, texts))
        run.add(forward)
        found += [reading.score[0] for reading in run.readings(0)]
    return torch.stack(found)


def probe_table() -> list[str]:
    """How many prompts of each kind the probe flags, for every concept of the tiny world."""
    lines = ["| concept | its own words | held-out words | near neighbours | benign | highest benign risk | AUROC |"]
    lines.append("|---|---|---|---|---|---|---|")
    model = load_model("tinyworld")
    for path in sorted(BUNDLED.glob("*.safetensors")):
        (concept,) = load_concepts(path)
        kinds = {
            "own": world.unsafe_prompts(concept.slug, PROMPTS, SEED, test=True),
            "held out": world.unsafe_prompts(concept.slug, PROMPTS, SEED, held_out=True, test=True),
            "neighbours": world.neighbour_prompts(concept.slug, PROMPTS, SEED, test=True),
            "benign": world.benign_prompts(concept.slug, PROMPTS, SEED, test=True),
        }
        risk = {kind: scores(model, concept, prompts) for kind, prompts in kinds.items()}
        flagged = [f"{100 * (each > FLAG_ABOVE).float().mean():.1f} %" for each in risk.values()]
        unsafe = torch.cat([risk["own"], risk["held out"]])
        lines.append(
            f"| {concept.slug} | {' | '.join(flagged)} | {risk['benign'].max():.2f} | "
            f"{auroc(unsafe, risk['benign']):.3f} |"
        )
    return lines


def auroc(high: Tensor, low: Tensor) -> float:
    """How often one of `high` exceeds one of `low`; ties count half."""
    pairs = high[:, None] - low[None]
    return ((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean().item()


def draw_risk(server: ComfyUI, info: dict) -> None:
    """docs/risk-*.png: the pictures of Risk Map in its own example workflow."""
    graph = api_prompt(json.loads(RISK_MAP.read_text(encoding="utf-8")), info)
    (node,) = (number for number, each in graph.items() if each["class_type"] == "SafeRoPE_RiskMap")
    slots = info["SafeRoPE_RiskMap"]["output_name"]
    shown = {f"shown {name}": [node, slots.index(name)] for name in RISK_PICTURES}
    graph |= {key: {"class_type": "PreviewImage", "inputs": {"images": source}} for key, source in shown.items()}
    outputs = server.run(graph)
    for name in RISK_PICTURES:
        picture = server.image(outputs[f"shown {name}"]["images"][0])
        picture.quantize(COLOURS).save(ROOT / "docs" / f"risk-{name}.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
        info = server.object_info()
        draw_risk(server, info)
    parts = {"NODES": node_tables(info), "PROBE": probe_table()}
    page = PAGE.with_suffix(".md.in").read_text(encoding="utf-8")
    for name, lines in parts.items():
        page = page.replace(f"@{name}@", "\n".join(lines).rstrip())
    PAGE.write_text(page, encoding="utf-8")
    print("\n".join(parts["PROBE"]))


if __name__ == "__main__":
    main()
