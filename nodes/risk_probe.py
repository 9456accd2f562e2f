"""Measures the risk of a prompt before sampling, in a few passes of the network. A service can branch or refuse."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..saferope_core import Concept, Protection
from .host.cards import probe_picture
from .host.network import flux_geometry
from .host.patch import AttentionPatch, patched
from .host.recorder import Record, Recorder
from .host.risk import FLAG_ABOVE, NO_TEXT, comparable, heads_picture, listed, report, words_picture
from .inputs import SEARCHED, ConceptType, require_range

REPORT, REFUSE = "report", "stop with an error"
SCHEDULE = 20  # steps of the sampling whose first ones are taken
MOST_STEPS = 8
# Of a conditioning, in ComfyUI's words: the steps in which it acts. A "default" acts only where no other one does.
STEPS_OF = {"start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "default"}
SIDE = 64  # latent rows and columns without a latent: 512 x 512 pixels; the risk of words hardly depends on the size


def probe(model: Any, concepts: list[Concept], positive: list, latent: dict | None, steps: int, seed: int) -> Record:
    """Samples the first steps without turning anything, and returns the risk above the concepts' gates.

    All of the prompt is measured in them, also conditionings that would act in later steps alone.
    """
    geometry = flux_geometry(model)
    protection = Protection(concepts, geometry)
    recorder = Recorder([concept.name for concept in concepts], geometry)
    watched = patched(model, AttentionPatch(protection, recorder=recorder, watching=True))
    start = torch.zeros(1, 16, SIDE, SIDE) if latent is None else latent["samples"]
    start = comfy.sample.fix_empty_latent_channels(watched, start)
    sampling = watched.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", SCHEDULE)[: steps + 1]
    noise = comfy.sample.prepare_noise(start, seed)
    euler, positive = comfy.samplers.sampler_object("euler"), _at_all_steps(positive)
    out = comfy.sample.sample_custom(
        watched, noise, 1.0, euler, sigmas, positive, positive, start, disable_pbar=True, seed=seed
    )
    return recorder.of(out)


def _at_all_steps(conditioning: list) -> list:
    """The conditioning without ranges of steps: of ConditioningSetTimestepRange, scheduled text encoders, defaults."""
    return [
        [states, {key: value for key, value in more.items() if key not in STEPS_OF}] for states, more in conditioning
    ]


def require_all_measured(record: Record, said: str) -> None:
    """Raise ValueError where a concept has no risk: it could be anything, so the prompt must not go on."""
    if record.unmeasured:
        raise ValueError(
            f"This prompt was refused: the risk of {listed(record.unmeasured)} was not measured, as {NO_TEXT}. "
            "Expected a risk "
            "of every concept. Set its strength above 0 in SafeRoPE Load Concept, connect a concept that turns text "
            "tokens, or "
            f"take it out.\n{said}"
        )


class RiskProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_RiskProbe",
            display_name="SafeRoPE Risk Probe",
            category="SafeRoPE",
            description="Measures the risk of a prompt before anything is painted, with one pass of the model. Branch "
            "on the result, log it, or refuse the prompt.",
            search_aliases=[*SEARCHED, "safety checker", "prompt filter", "nsfw detector", "moderation"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model, best before SafeRoPE Apply. Behind Apply the remaining risk is measured.",
                ),
                ConceptType.Input("concept", tooltip="The concepts to look for, from SafeRoPE Load Concept."),
                io.Conditioning.Input("positive", tooltip="The encoded prompt."),
                io.Float.Input(
                    "flag_above",
                    default=FLAG_ABOVE,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 to 1: a risk above this is flagged. Harmless prompts stay below 0.4. A lower value "
                    "catches more.",
                ),
                io.Combo.Input(
                    "if_flagged",
                    options=[REPORT, REFUSE],
                    default=REPORT,
                    tooltip="Report and continue (branch on `flagged`), or stop with an error.",
                ),
                io.Int.Input(
                    "steps",
                    default=1,
                    min=1,
                    max=MOST_STEPS,
                    optional=True,
                    tooltip=f"1 to {MOST_STEPS} passes of the model, the first of {SCHEDULE} steps. One is enough for "
                    "words.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    optional=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The seed of the noise.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="Its size is used. Without it: 512 x 512 pixels."),
                io.Clip.Input("clip", optional=True, tooltip="The encoder of the prompt, to name its words."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The prompt, to name its words. Connect the text of the conditioning.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "risk",
                    tooltip="0 to 1: the highest risk of any concept. Without a risk of every concept it has no "
                    "value, and nodes connected to it do not run.",
                ),
                io.Boolean.Output(
                    "flagged", tooltip="True if the risk is above flag_above, or if a concept has no risk."
                ),
                io.String.Output("report", tooltip="The risk in words, concept by concept."),
                io.Image.Output("words", tooltip="The prompt's words under bars of their risk."),
                io.Image.Output("heads", tooltip="The attention heads that found the riskiest word risky."),
                io.Image.Output("card", tooltip="The card on the node: concept, risk and words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: list[Concept],
        positive: list,
        flag_above: float,
        if_flagged: str,
        steps: int = 1,
        seed: int = 0,
        latent: dict | None = None,
        clip: Any | None = None,
        text: str = "",
    ) -> io.NodeOutput:
        require_range("flag_above", flag_above, 0.0, 1.0)
        require_range("steps", steps, 1, MOST_STEPS)
        if if_flagged not in (REPORT, REFUSE):
            raise ValueError(f"if_flagged is {if_flagged!r:.60}, expected {REPORT!r} or {REFUSE!r}.")
        if all(each.strength == 0 for each in concept):
            raise ValueError("The strength of every concept is 0, so there is nothing to look for. Set one above 0.")
        record = probe(model, concept, positive, latent, steps, seed)
        said = report(record, clip, text, flag_above)
        if if_flagged == REFUSE:
            require_all_measured(record, said)
        flagged = record.score is None or record.score > flag_above
        if flagged and if_flagged == REFUSE:
            raise ValueError(f"This prompt was refused: its risk is {record.score:.2f}, above {flag_above:g}.\n{said}")
        bars, heads = words_picture(record, clip, text, flag_above), heads_picture(record, flux_geometry(model))
        card = probe_picture(record, clip, text, flag_above)
        shown = ui.PreviewImage(card, cls=cls).as_dict()["images"]
        return io.NodeOutput(
            comparable(record), flagged, said, bars, heads, card, ui={"images": shown, "text": (said,)}
        )
