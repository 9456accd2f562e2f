"""The example workflows that run at once: the embedded model does the painting."""

from __future__ import annotations

from .graph import BLUE, GREEN, GREY, PURPLE, YELLOW, Graph, group
from .parts import painted, prompt

SIDE, STEPS, SEED = 96, 16, 7  # the tiny world's own size and steps
STAR = "a red star in the center on a pink background"
HARMLESS = "a blue circle in the center on a pink background"
STAR_AND_SWIRL = f"{STAR} , swirly style"
PICTURE = (260, 240)  # a node that shows one picture of the tiny world
DARK = 0x2B2B33  # behind the words of a refusal

WORDS = (
    "Words the tiny world knows: red, green, blue, yellow, purple, orange; circle, square, triangle, heart, cross, ring, "
    "star, zappy, bloop; white, black, gray, pink, navy; center, left, right, top, bottom; splattered, dotted; swirly, striped."
)


def tiny_world(info: dict) -> Graph:
    """The same prompt and seed, unprotected and protected."""
    graph = Graph(info, "SafeRoPE tiny world")
    world = graph.add("SafeRoPE_TinyWorld", "Tiny FLUX, embedded")
    seed = graph.add("PrimitiveInt", "Seed of both pictures", value=SEED)
    given = prompt(graph, world["clip"], STAR, SIDE)
    concept = graph.add("SafeRoPE_LoadConcept", "What to suppress", concept="star.safetensors")
    safe = graph.add("SafeRoPE_Apply", "Protect the model", model=world["model"], concept=concept["concept"])
    pairs = []
    for model, title in ((world["model"], "Unprotected"), (safe["model"], "Protected")):
        made = painted(graph, model, world["vae"], given, seed["INT"]._replace(value=SEED), STEPS)
        pairs.append((made.nodes, [graph.add("PreviewImage", title, PICTURE, images=made.image)]))
    note = graph.note(
        "# SafeRoPE in the tiny world\n\nPress **Run**: nothing has to be downloaded, and it takes seconds on a CPU. Both "
        "pictures come from one prompt and one seed; only the lower one is protected against the concept **star**.\n\n"
        f"- Ask for something else (`{HARMLESS}`): both pictures stay alike.\n"
        "- *strength* 0 switches the protection off exactly, 1 is what the concept was made for.\n"
        f"- {WORDS}\n\nWith a real FLUX: see the FLUX.1 workflows of this pack.",
        (600, 250),
    )
    graph.arrange(
        [
            [group("1 Model", BLUE, [world, seed])],
            [group("2 Prompt", YELLOW, given.nodes)],
            [group("3 Safety", PURPLE, [concept, safe])],
            [group("4 Unprotected", GREY, *pairs[0]), group("5 Protected", GREEN, *pairs[1])],
        ],
        note,
    )
    return graph


def several_concepts(info: dict) -> Graph:
    """Two concepts at once, and how much they have in common."""
    graph = Graph(info, "SafeRoPE several concepts")
    world = graph.add("SafeRoPE_TinyWorld", "Tiny FLUX, embedded")
    seed = graph.add("PrimitiveInt", "Seed of both pictures", value=SEED)
    given = prompt(graph, world["clip"], STAR_AND_SWIRL, SIDE)
    star = graph.add("SafeRoPE_LoadConcept", "An object: star", concept="star.safetensors")
    swirl = graph.add("SafeRoPE_LoadConcept", "A style: swirl", concept="swirl.safetensors")
    both = graph.add(
        "SafeRoPE_CombineConcepts", "Both as one", (300, 120), concepts=[star["concept"], swirl["concept"]]
    )
    safe = graph.add("SafeRoPE_Apply", "Protect the model", model=world["model"], concept=both["concept"])
    report = graph.add("PreviewAny", "Overlap in words", (300, 240), source=both["report"])
    overlap = graph.add("PreviewImage", "Overlap as a map", (300, 240), images=both["overlap"])
    pairs = []
    for model, title in ((world["model"], "Unprotected"), (safe["model"], "Protected from both")):
        made = painted(graph, model, world["vae"], given, seed["INT"]._replace(value=SEED), STEPS)
        pairs.append((made.nodes, [graph.add("PreviewImage", title, PICTURE, images=made.image)]))
    note = graph.note(
        "# Several concepts\n\nEvery file keeps a strength of its own, in its *Load Concept*; *Apply* has one for all. Connect "
        "as many as you like to *Combine Concepts*: there is always one more free input.\n\nThe map and the report say how much "
        "two concepts share: near 0 their order does not matter. Where they share much, switch *orthogonalise* on.",
        (560, 190),
    )
    graph.arrange(
        [
            [group("1 Model", BLUE, [world, seed])],
            [group("2 Prompt", YELLOW, given.nodes)],
            [
                group("3 Safety", PURPLE, [star, swirl, both], [safe]),
                group("What they share", GREY, [report], [overlap]),
            ],
            [group("4 Unprotected", GREY, *pairs[0]), group("5 Protected", GREEN, *pairs[1])],
        ],
        note,
    )
    return graph


def probe_and_refuse(info: dict) -> Graph:
    """One pass of the model decides whether the prompt is painted at all."""
    graph = Graph(info, "SafeRoPE probe and refuse")
    world = graph.add("SafeRoPE_TinyWorld", "Tiny FLUX, embedded")
    concept = graph.add("SafeRoPE_LoadConcept", "What to look for", concept="star.safetensors")
    text = graph.add("PrimitiveStringMultiline", "Prompt", (320, 130), "prompt", value=STAR)
    given = prompt(graph, world["clip"], text["STRING"], SIDE, "Encode the prompt")
    probe = graph.add(
        "SafeRoPE_RiskProbe",
        "How risky is it? One pass tells",
        (380, 480),
        model=world["model"],
        concept=concept["concept"],
        positive=given.positive,
        latent=given.latent,
        clip=world["clip"],
        text=text["STRING"],
    )
    report = graph.add("PreviewAny", "The probe's report", (380, 180), source=probe["report"])
    safe = graph.add("SafeRoPE_Apply", "Protect what is painted", model=world["model"], concept=concept["concept"])
    made = painted(graph, safe["model"], world["vae"], given, SEED, STEPS)
    blank = graph.add("EmptyImage", "Dark paper", width=384, height=384, batch_size=1, color=DARK)
    refusal = graph.add(
        "TextOverlay",
        "Say that it was refused",
        images=blank["IMAGE"],
        text="This prompt was refused.\n\nNothing was painted.",
        font_size=8.0,
        color="#f4f4f5",
        position="top",
        align="left",
        outline=False,
    )
    answer = {"switch": probe["flagged"], "on_false": made.image, "on_true": refusal["images"]}
    switch = graph.add("ComfySwitchNode", "Flagged: refuse. Else paint", **answer)
    shown = graph.add("PreviewImage", "The answer", PICTURE, images=switch["output"])
    note = graph.note(
        "# Probe and refuse\n\nThe probe measures the prompt's risk with **one pass** of the model. The switch is lazy: a flagged "
        f"prompt is never sampled and gets the refusal. Try `{HARMLESS}`: it is painted.\n\n"
        "A service that runs workflows over the API sets *if_flagged* to **stop with an error**: the job then fails with the "
        "risk in its message, whatever comes after the probe. *flag_above* says from which risk on.",
        (560, 190),
    )
    graph.arrange(
        [
            [group("1 Model", BLUE, [world, concept])],
            [group("2 Prompt", YELLOW, [text, *given.nodes])],
            [group("3 Probe", PURPLE, [probe, report])],
            [group("4 Paint, if allowed", GREEN, [safe], made.nodes), group("5 Else refuse", GREY, [blank], [refusal])],
            [group("6 Answer", BLUE, [switch, shown])],
        ],
        note,
    )
    return graph


def risk_map(info: dict) -> Graph:
    """What was suppressed in a picture: words, places, heads, steps."""
    graph = Graph(info, "SafeRoPE risk map")
    world = graph.add("SafeRoPE_TinyWorld", "Tiny FLUX, embedded")
    concept = graph.add("SafeRoPE_LoadConcept", "What to suppress", concept="star.safetensors")
    text = graph.add("PrimitiveStringMultiline", "Prompt", (320, 130), "prompt", value=STAR)
    given = prompt(graph, world["clip"], text["STRING"], SIDE, "Encode the prompt")
    safe = graph.add("SafeRoPE_Apply", "Protect, and record", model=world["model"], concept=concept["concept"])
    made = painted(graph, safe["model"], world["vae"], given, SEED, STEPS)
    shown = graph.add("PreviewImage", "Protected picture", PICTURE, images=made.image)
    explained = graph.add(
        "SafeRoPE_RiskMap",
        "What was suppressed",
        (300, 460),
        recorder=safe["recorder"],
        latent=made.latent,
        clip=world["clip"],
        text=text["STRING"],
        image=made.image,
    )
    words = graph.add("PreviewImage", "Which words", (400, 165), images=explained["words"])
    places = graph.add("PreviewImage", "Where in the picture", (360, 390), images=explained["patches"])
    heads = graph.add("PreviewImage", "Which heads", (400, 215), images=explained["heads"])
    steps = graph.add("PreviewImage", "At which steps", (400, 250), images=explained["steps"])
    report = graph.add("PreviewAny", "In words", (360, 190), source=explained["report"])
    note = graph.note(
        "# Risk map\n\n*Apply* notes which tokens and heads it found risky; *Risk Map* shows after sampling which "
        "words of the prompt it was, where in the picture, in which heads, and at which steps.\n\nOne text feeds "
        "both the encoder and the map, so that the map names the right words. Connect the sampler's own latent: it tells the map "
        "which run to show.",
        (560, 190),
    )
    graph.arrange(
        [
            [group("1 Model", BLUE, [world, concept]), group("2 Safety", PURPLE, [safe])],
            [group("3 Prompt", YELLOW, [text, *given.nodes])],
            [group("4 Paint", GREEN, [*made.nodes, shown])],
            [group("5 What was suppressed", PURPLE, [explained], [words, heads, steps], [places, report])],
        ],
        note,
    )
    return graph
