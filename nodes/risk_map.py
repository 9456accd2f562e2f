"""After sampling: the suppressed risk, in which words, where in the picture, in which heads, and when."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from .host.cards import card_picture, unmeasured_picture
from .host.recorder import Recorder, RecorderType
from .host.risk import (
    FLAG_ABOVE,
    comparable,
    heads_picture,
    patches_picture,
    report,
    require_measured,
    steps_picture,
    unmeasured_pictures,
    words_picture,
)


class RiskMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_RiskMap",
            display_name="SafeRoPE Risk Map",
            category="SafeRoPE",
            description="Shows the words, places, heads and steps that SafeRoPE Apply found risky in a picture.",
            search_aliases=["heat map", "explain", "risk score", "what was suppressed", "saferope"],
            inputs=[
                RecorderType.Input("recorder", tooltip="From the SafeRoPE Apply that protects the sampler's model."),
                io.Latent.Input("latent", tooltip="The sampler's output, unchanged. It selects the run."),
                io.Clip.Input("clip", optional=True, tooltip="The encoder of the prompt, to name its words."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The positive prompt, to name its words. Connect the text of the encoded prompt.",
                ),
                io.Image.Input("image", optional=True, tooltip="The decoded picture, to draw the heat map over it."),
            ],
            outputs=[
                io.Float.Output(
                    "risk",
                    tooltip="0 to 1: the highest risk of any concept and picture. Without a risk of every concept it "
                    "has no value, and nodes connected to it do not run.",
                ),
                io.String.Output("report", tooltip="The same in words, concept by concept."),
                io.Image.Output("words", tooltip="The prompt's words under bars of their risk."),
                io.Image.Output("patches", tooltip="Risky places, as a heat map over each picture."),
                io.Image.Output("heads", tooltip="The attention heads that found the riskiest word risky."),
                io.Image.Output("steps", tooltip="Risk over the steps."),
                io.Image.Output("card", tooltip="The card on the node: concept, risk, picture and words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        recorder: Recorder,
        latent: dict[str, Any],
        clip: Any | None = None,
        text: str = "",
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        if recorder.off:
            return _unmeasured(cls, recorder.off)
        record = recorder.of(latent["samples"])
        require_measured(record)
        words = report(record, clip, text, FLAG_ABOVE)
        pictures = (
            words_picture(record, clip, text, FLAG_ABOVE),
            patches_picture(record, image),
            heads_picture(record, recorder.geometry),
            steps_picture(record),
            card_picture(record, recorder.geometry, clip, text, FLAG_ABOVE, image),
        )
        return io.NodeOutput(comparable(record), words, *pictures, ui=_shown(cls, pictures[-1], words))


def _unmeasured(cls: type[RiskMap], why: str) -> io.NodeOutput:
    """The outputs for a model that was not protected, or not recorded. It has no risk, which is not a risk of 0."""
    said = f"not measured: {why}. Change that in SafeRoPE Apply."
    risk, card = ExecutionBlocker(f"SafeRoPE has no risk to compare: {said}"), unmeasured_picture(why)
    return io.NodeOutput(risk, said, *unmeasured_pictures(why), card, ui=_shown(cls, card, said))


def _shown(cls: type[RiskMap], card: Tensor, said: str) -> dict[str, Any]:
    """One card for the node, which shows several pictures too small to read."""
    return {"images": ui.PreviewImage(card, cls=cls).as_dict()["images"], "text": (said,)}
