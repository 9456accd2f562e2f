"""What a concept is, to look at: its heads, its spectrum, where it comes from."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..saferope_core import Concept, Geometry
from ..saferope_core.concept.untrusted import printable
from .draw.charts import bars, heat_map
from .load import ConceptType, introduced

MOST_DRAWN = 16  # concepts: 64 of the largest geometry would take 2 GB of pictures


class InspectConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_InspectConcept",
            display_name="SafeRoPE Inspect Concept",
            category="SafeRoPE",
            description="Shows which attention heads a concept was found in, how its risk subspace is made up, and how the "
            "file was made.",
            search_aliases=["head map", "concept info", "provenance", "saferope"],
            inputs=[ConceptType.Input("concept", tooltip="From SafeRoPE Load Concept.")],
            outputs=[
                io.Image.Output("heads", tooltip="Δ of every head, a map for each concept; framed heads are turned."),
                io.Image.Output("spectrum", tooltip="How much of the subject each direction of the subspace holds."),
                io.String.Output("text", tooltip="Geometry, settings and provenance."),
            ],
        )

    @classmethod
    def execute(cls, concept: list[Concept]) -> io.NodeOutput:
        drawn, left = concept[:MOST_DRAWN], len(concept) - MOST_DRAWN
        maps = batched([head_map(each) for each in drawn])
        spectra = batched([spectrum(each) for each in drawn])
        more = [f"Pictures show the first {MOST_DRAWN} concepts; {left} more are not drawn."] if left > 0 else []
        return io.NodeOutput(maps, spectra, "\n\n".join([*map(describe, concept), *more]))


def head_map(concept: Concept) -> Tensor:
    """Blocks across, heads down; IMAGE [1, h, w, 3]."""
    framed = torch.zeros_like(concept.discrimination, dtype=torch.bool)
    rows = concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]
    framed[rows.long(), concept.heads[:, 2].long()] = True
    title = f"{concept.name}: {len(concept.heads)} of {framed.numel()} heads are safety-critical"
    heads = [str(head) for head in range(concept.geometry.heads)]
    return heat_map(concept.discrimination.T, heads, block_names(concept.geometry), title, "discrimination", framed.T)


def block_names(geometry: Geometry) -> list[str]:
    """d0, d1, ... s0, s1, ..."""
    return [f"d{i}" for i in range(geometry.double_blocks)] + [f"s{i}" for i in range(geometry.single_blocks)]


def spectrum(concept: Concept) -> Tensor:
    """Share of the subject's energy in each direction, averaged over heads; all 0 where the file does not say."""
    values = concept.singular_values
    if values is None:
        shares = torch.zeros(concept.rank)
    else:
        energy = (values / values.amax(1, keepdim=True).clamp(min=1e-30)).square()  # of any size: the largest is 1
        shares = (energy / energy.sum(1, keepdim=True).clamp(min=1e-12)).mean(0)
    labels = [f"direction {number + 1}" for number in range(concept.rank)]
    title = f"{concept.name}: spectrum of the unsafe subspace" + ("" if values is not None else " (not in the file)")
    return bars(shares.tolist(), labels, title, "share of the subject's energy, mean over heads")


def describe(concept: Concept) -> str:
    """What there is to know, in lines."""
    made, versions = concept.training.get("settings", {}), concept.training.get("versions", {})
    lines = [
        *introduced(concept),
        f"for {concept.geometry.describe()}",
        f"risk in {concept.rank} of {concept.geometry.head_dim} dimensions, {concept.reach} more to turn into",
        f"turns {concept.acts('text')} of text and {concept.acts('image')} of image tokens, strength {concept.strength:g}",
        f"generator: {concept.mode}",
    ]
    if made:
        found = ", ".join(f"{key} {made[key]}" for key in ("model", "seed", "steps") if key in made)
        lines.append(printable(f"made with {found}"))
    if versions:
        lines.append(printable("by " + ", ".join(f"{key} {value}" for key, value in versions.items())))
    return "\n".join(lines)


def batched(pictures: list[Tensor]) -> Tensor:
    """One batch of pictures of different sizes: white is added right and below."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    batch = torch.ones(len(pictures), height, width, 3)
    for place, picture in zip(batch, pictures, strict=True):
        place[: picture.shape[1], : picture.shape[2]] = picture[0]
    return batch
