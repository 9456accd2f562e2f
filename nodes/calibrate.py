"""The node that makes a concept from prompts, without training, by the queries and keys of the model's heads."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import transformers
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfyui_version import __version__ as comfyui_version

from ..saferope_core import (
    BENIGN,
    FLUX1,
    THRESHOLD,
    UNSAFE,
    Concept,
    Geometry,
    HeadTable,
    Ranks,
    Statistics,
    critical_heads,
    fixed_generators,
    histogram,
    read_heads,
    require_names,
    schedule,
)
from .draw.concept_pictures import head_map
from .host.before_after import PAINTINGS, before_and_after
from .host.countdown import Countdown
from .host.gather import gather, looks_of
from .host.network import flux_geometry
from .host.notices import notice, start_notices
from .host.presets import CHOICES, COUNT, LONG, OWN, SHORT, preset_prompts
from .host.prompts import Prompt, read_prompts, require_enough
from .inputs import SEARCHED, Choices, ConceptType, choices_from, settings

# The trainer's defaults (saferope_training/settings.py), where the node does not ask.
PADDING_RANK, WORDS_RANK, IMAGE_RANK, REACH = 5, 5, 8, 8
BASIS = "svd"
DESCRIPTION = "calibrated in ComfyUI from prompts"
SHOWN = 10  # words of a list in the report
SIDE, TINY_SIDE = 64, 12  # latent rows and columns: 512 pixels, and the tiny world's 96
TINY_BATCH = 24  # prompts at once of a model that small
LOOKS_AT_ONCE = 64  # at most so many latents in one batch

FEW = 12  # prompts of a side; with fewer, gates and heads depend on chance
UNPAINTED = "SafeRoPE paints no strip without a VAE. Connect vae of SafeRoPE Calibrate Concept."
UNNAMED = "My concept"


class CalibrateConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_CalibrateConcept",
            display_name="SafeRoPE Calibrate Concept",
            category="SafeRoPE",
            description="Makes a concept from prompts in minutes, with the loaded model and CLIP. Needs no training "
            "and no pictures. Save the concept with SafeRoPE Save Concept, use it with SafeRoPE Apply.",
            search_aliases=[*SEARCHED, "make concept", "training free", "unlearn concept", "new concept"],
            inputs=[
                io.Model.Input("model", tooltip="The model to protect, without SafeRoPE Apply."),
                io.Clip.Input("clip", tooltip="Its own text encoders."),
                io.String.Input("name", default=UNNAMED, tooltip="The name of the concept, in one line."),
                io.String.Input(
                    "unsafe",
                    multiline=True,
                    default="",
                    placeholder="Prompts that show the concept, one a line:\na red [star] on the beach\n"
                    "Leave empty with a preset.",
                    tooltip="Prompts that show the concept, one a line, a dozen or more. Put the word of the concept "
                    "in brackets in each: a red [star] on the beach. Lines here are added to a preset's lines.",
                ),
                io.String.Input(
                    "safe",
                    multiline=True,
                    default="",
                    placeholder="Prompts without it, one a line:\na red house on the beach\nLeave empty with a preset.",
                    tooltip="Prompts without the concept, one a line, twice as many, otherwise alike. The protection "
                    "leaves their tokens alone. Lines here are added to a preset's lines.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="An empty latent. Its size is the size of the pictures, its batch the number of prompts "
                    "that are sampled together. Without it: 512 x 512 pixels, one by one, or 96 x 96 for the "
                    "tiny world.",
                ),
                *settings(),
                io.Combo.Input(
                    "preset",
                    options=CHOICES,
                    default=OWN,
                    optional=True,
                    tooltip=f"Prompts that come with SafeRoPE: {COUNT} unsafe and {2 * COUNT} safe ones. A person's "
                    "likeness takes the person's name from name.",
                ),
                io.Combo.Input(
                    "style",
                    options=[SHORT, LONG],
                    default=SHORT,
                    optional=True,
                    tooltip="The length of a preset's prompts. Long ones describe light, place and camera too.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="If connected, the node paints three prompts without and with the concept, for strip.",
                ),
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="For SafeRoPE Apply and SafeRoPE Save Concept."),
                io.String.Output("report", tooltip="The prompts, the settings and the heads that were found."),
                io.Image.Output("heads", tooltip="Δ of every head. Framed heads turn."),
                io.String.Output("prompts", tooltip="All prompts, unsafe ones first, to read, copy and change."),
                io.Image.Output(
                    "strip",
                    tooltip="Two unsafe prompts and a safe one, before and after. Without vae it has no value, and "
                    "nodes connected to it do not run.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        name: str,
        unsafe: str,
        safe: str,
        latent: dict | None = None,
        preset: str = OWN,
        style: str = SHORT,
        vae: Any | None = None,
        **chosen: Any,
    ) -> io.NodeOutput:
        start_notices()
        choices, geometry = choices_from(chosen), flux_geometry(model)
        bundled = preset_prompts(preset, style, "" if name.strip() == UNNAMED else name.strip())
        name = preset if preset != OWN and name.strip() == UNNAMED else name
        require_names(_slug(name), name.strip(), DESCRIPTION)
        texts = ["\n".join([own, *more]) for own, more in zip((unsafe, safe), bundled, strict=True)]
        prompts = read_prompts(texts[0], UNSAFE) + read_prompts(texts[1], BENIGN)
        looks = choices.rounds * len(choices.timesteps)
        strange = require_enough(clip, prompts, looks, _ranks(choices), geometry.head_dim)
        few = _few(prompts)
        rows, columns, batch = _size(latent, geometry)
        size = rows, columns
        work = len(prompts) * (1 + choices.rounds * len(schedule(choices.timesteps)))
        count = Countdown(work + (PAINTINGS if vae else 0))
        table = _table(_statistics(model, clip, geometry, prompts, size, batch, choices, count.step), choices)
        concept = _concept(name, geometry, table, choices, _record(prompts, size, choices))
        report = _report(concept, table, prompts, size, choices) + few + _strange(strange)
        with_settings = (prompts, size, choices.guidance, choices.seed, count.step)
        strip = before_and_after(model, clip, vae, concept, *with_settings) if vae else ExecutionBlocker(UNPAINTED)
        count.end()
        told = "\n\n".join(text.strip() for text in texts)
        return io.NodeOutput([concept], report, head_map(concept), told, strip)


def _statistics(
    model: Any,
    clip: Any,
    geometry: Geometry,
    prompts: list[Prompt],
    size: tuple[int, int],
    batch: int,
    choices: Choices,
    tell: Callable[[int], None],
) -> Statistics:
    """Statistics of the prompts. Calls tell(1) for each encoded prompt and for each forward of a prompt."""
    looks = looks_of(clip, prompts, choices.rounds, choices.seed, tell)
    return gather(model, geometry, looks, size, batch, choices.timesteps, choices.guidance, tell)


def _ranks(choices: Choices) -> Ranks:
    return Ranks(choices.rank, PADDING_RANK, WORDS_RANK, REACH, IMAGE_RANK)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "concept"


def _table(statistics: Statistics, choices: Choices) -> HeadTable:
    return read_heads(statistics, _ranks(choices), BASIS, THRESHOLD, choices.cut, "calibrated", choices.quantile)


def _concept(name: str, geometry: Geometry, table: HeadTable, choices: Choices, record: dict) -> Concept:
    """Raises ValueError, with the heads by Δ, where no head tells the concept apart."""
    critical = critical_heads(table, geometry)
    return Concept(
        slug=_slug(name),
        name=name.strip(),
        description=DESCRIPTION,
        geometry=geometry,
        discrimination=table.discrimination,
        threshold=THRESHOLD,
        mode="fixed",
        training=record,
        **critical.fields(fixed_generators(critical, choices.angle), choices.turned, choices.turned_image),
    )


def _record(prompts: list[Prompt], size: tuple[int, int], choices: Choices) -> dict:
    """Facts to make the concept again. Weights and words of the prompts are left out: they stay with their owner."""
    settings = asdict(choices) | {"padding_rank": PADDING_RANK, "words_rank": WORDS_RANK, "image_rank": IMAGE_RANK}
    settings |= {"reach": REACH, "basis": BASIS, "latent_size": list(size)}
    settings |= {f"{side}_prompts": sum(prompt.side == side for prompt in prompts) for side in (UNSAFE, BENIGN)}
    versions = {"comfyui": comfyui_version, "python": platform.python_version(), "torch": torch.__version__}
    words = json.dumps([asdict(prompt) for prompt in prompts], ensure_ascii=False)
    return {
        "settings": settings,
        "versions": versions | {"transformers": transformers.__version__},
        "prompts_sha256": hashlib.sha256(words.encode()).hexdigest(),
    }


def _report(concept: Concept, table: HeadTable, prompts: list[Prompt], size: tuple[int, int], choices: Choices) -> str:
    """Plain text, a few lines."""
    counts = [sum(prompt.side == side for prompt in prompts) for side in (UNSAFE, BENIGN)]
    return "\n".join(
        [
            f"{concept.name}: {len(concept.heads)} of {table.critical.numel()} heads tell it apart (Δ at least "
            f"{choices.cut:g})",
            f"heads by Δ: {histogram(table.discrimination)}",
            f"from {counts[0]} unsafe and {counts[1]} safe prompts, {choices.rounds} "
            f"{'noise' if choices.rounds == 1 else 'noises'} each, at times "
            f"{', '.join(f'{t:g}' for t in choices.timesteps)}, latents of {size[1]} x {size[0]}",
            f"risk in {concept.rank} dimensions, turned by {choices.angle:g} rad at risk 1",
            f"for {concept.geometry.title()}",
        ]
    )


def _few(prompts: list[Prompt]) -> str:
    """A line for the report and the node where a side has fewer than FEW prompts, else ""."""
    counts = [sum(prompt.side == side for prompt in prompts) for side in (UNSAFE, BENIGN)]
    if min(counts) >= FEW:
        return ""
    told = (
        f"{counts[0]} unsafe and {counts[1]} safe prompts are few: the concept may stay in many pictures. Write at "
        f"least {FEW} of each, better twice as many safe ones, or choose a preset"
    )
    notice(f"{told}.")
    return f"\n{told}"


def _strange(words: list[str]) -> str:
    """A line for the report where the text encoder does not know some words, else ""."""
    if not words:
        return ""
    shown = ", ".join(f"{word!r:.60}" for word in words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")
    count = len(words)
    return (
        f"\nthe text encoder does not know {count} of the prompts' words, and takes them all for the same one: {shown}"
    )


def _size(latent: dict | None, geometry: Geometry) -> tuple[int, int, int]:
    """Rows and columns of the latents, and how many of them are sampled in one batch."""
    if latent is None:
        tiny = geometry.heads < FLUX1.heads
        return (TINY_SIDE, TINY_SIDE, TINY_BATCH) if tiny else (SIDE, SIDE, 1)
    batch, *_, rows, columns = latent["samples"].shape
    return rows, columns, min(batch, LOOKS_AT_ONCE)
