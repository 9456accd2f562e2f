"""What most workflows have in common: an encoded prompt, a latent, and a sampler with what it needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from .graph import Graph, Node, Out


class Prompt(NamedTuple):
    """`positive` and `negative` are what a sampler is given; `nodes` in the order in which they are read."""

    positive: Out
    negative: Out
    latent: Out
    nodes: list[Node]


class Painted(NamedTuple):
    latent: Out
    image: Out
    nodes: list[Node]


def prompt(graph: Graph, clip: Out, text: Any, side: int, title: str = "Prompt") -> Prompt:
    """A text, or a link that brings one, encoded; no negative prompt, which cfg 1 never reads; an empty latent."""
    linked = isinstance(text, Out)
    size, color = ((320, 0), "") if linked else ((320, 190), "prompt")
    encoded = graph.add("CLIPTextEncode", title, size, color, clip=clip, text=text)
    positive = encoded["CONDITIONING"]
    nothing = graph.add("ConditioningZeroOut", "No negative prompt (cfg 1)", conditioning=positive)
    latent = graph.add("EmptySD3LatentImage", "Size", width=side, height=side, batch_size=1)
    return Prompt(positive, nothing["CONDITIONING"], latent["LATENT"], [encoded, nothing, latent])


def painted(
    graph: Graph, model: Out, vae: Out, given: Prompt, seed: Any, steps: int, title: str | None = None
) -> Painted:
    """KSampler as FLUX wants it (euler, simple, cfg 1), and its picture."""
    sampler = graph.add(
        "KSampler",
        title,
        model=model,
        positive=given.positive,
        negative=given.negative,
        latent_image=given.latent,
        seed=seed,
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    decoded = graph.add("VAEDecode", samples=sampler["LATENT"], vae=vae)
    return Painted(sampler["LATENT"], decoded["IMAGE"], [sampler, decoded])
