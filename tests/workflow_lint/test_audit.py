"""`saferope audit`: each rule in every form of a workflow, with its opposite."""

from __future__ import annotations

import json

import pytest

from tests.support.workflows import OTHER_PIN, PIN, STAR, forms, node, protected
from workflow_lint.file import sorted_out
from workflow_lint.report import as_json, as_text
from workflow_lint.verdict import Required, audit_file

REQUIRED = Required()


def verdict(value, required=REQUIRED, files=None):
    return audit_file(sorted_out(json.loads(json.dumps(value))), required, files)


def verdicts(prompt, required=REQUIRED, files=None):
    """By form; each is also told in both ways, which must not fail."""
    found = {name: verdict(value, required, files) for name, value in forms(prompt).items()}
    for each in found.values():
        assert all(line.isprintable() for line in as_text("f", each).split("\n"))
        json.dumps(as_json("f", each), allow_nan=False)
    return {name: each.protected for name, each in found.items()}


def everywhere(answer):
    return dict.fromkeys(("api", "lists", "objects", "subgraph", "nested"), answer)


def with_nodes(changes, **apply):
    """The protected workflow with nodes added or replaced."""
    return protected(**apply) | changes


def combined(one=None, **more):
    """Two concepts over a Combine node."""
    nodes = {
        "7": node("SafeRoPE_LoadConcept", **({"concept": "moon.safetensors"} | (one or {}))),
        "8": node("SafeRoPE_CombineConcepts", concepts__concept0=("7", 0), concepts__concept1=("2", 0), **more),
    }
    return with_nodes(nodes, concept=("8", 0))


GUIDED = {
    "4": node("SamplerCustomAdvanced", guider=("9", 0), sigmas=("10", 0)),
    "10": node("BasicScheduler", model=("1", 0), denoise=1.0),  # reads the model's schedule, draws nothing
}
SAFE = {
    "plain": protected(),
    "strength by a primitive": with_nodes({"7": node("PrimitiveFloat", value=0.5)}, strength=("7", 0)),
    "a part of the steps": protected(end_percent=0.3),
    "a part of the steps of a guider": with_nodes(GUIDED | {"9": node("BasicGuider", model=("3", 0))}, end_percent=0.3),
    "some streams": protected(streams="text", conditionings="positive only"),
    "positive only, of a guider": with_nodes(
        GUIDED | {"9": node("CFGGuider", model=("3", 0))}, conditionings="positive only"
    ),
    "another pack's loader that is known": with_nodes({"1": node("UnetLoaderGGUF", unet_name="flux.gguf")}),
    "a fixed gate": protected(gate="fixed", threshold=0.99),
    "calibrated": with_nodes({"2": node("SafeRoPE_CalibrateConcept", unsafe="a star")}),
    "combined": combined(),
    "combined, one off": combined({"strength": 0.0}),
    "merged, both protected": with_nodes(
        {
            "7": node("CheckpointLoaderSimple"),
            "8": node("SafeRoPE_Apply", model=("7", 0), concept=("2", 0), strength=1.0),
            "9": node("ModelMergeSimple", model1=("3", 0), model2=("8", 0)),
            "4": node("KSampler", model=("9", 0)),
        }
    ),
    "merged, Apply after": with_nodes(
        {"7": node("UNETLoader"), "9": node("ModelMergeSimple", model1=("1", 0), model2=("7", 0))}, model=("9", 0)
    ),
    "LoRA before and after": with_nodes(
        {
            "7": node("LoraLoader", model=("1", 0)),
            "8": node("LoraLoader", model=("3", 0)),
            "4": node("KSampler", model=("8", 0)),
        },
        model=("7", 0),
    ),
    "two Applies, one off": with_nodes(
        {
            "7": node("SafeRoPE_Apply", model=("3", 0), concept=("2", 0), strength=0.0),
            "4": node("KSampler", model=("7", 0)),
        }
    ),
    "an unknown node that takes no model": with_nodes(
        {"7": node("StrangeFloat", value=1.0), "8": node("EmptySD3LatentImage", width=("7", 0))}
    ),
    "saved as it was loaded": with_nodes({"7": node("ModelSave", model=("1", 0))}),
    "both sides of a switch": with_nodes(
        {
            "8": node("SafeRoPE_Apply", model=("1", 0), concept=("2", 0), strength=1.0),
            "9": node("ComfySwitchNode", on_true=("3", 0), on_false=("8", 0)),
            "4": node("KSampler", model=("9", 0)),
        }
    ),
} | {
    guider: with_nodes(GUIDED | {"9": node(guider, model=("3", 0))})
    for guider in ("BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider")
}
UNSAFE = (
    {
        "a part of the steps, not the first": protected(start_percent=0.2, end_percent=0.9),
        "a part of the steps, and denoise below 1": with_nodes(
            {"4": node("KSampler", model=("3", 0), denoise=0.3)}, end_percent=0.5
        ),
        "a part of the steps, and denoise over a link": with_nodes(
            {"4": node("KSampler", model=("3", 0), denoise=("7", 0)), "7": node("StrangeFloat")}, end_percent=0.5
        ),
        "a part of the steps, and steps of a guider with denoise below 1": with_nodes(
            GUIDED
            | {
                "9": node("BasicGuider", model=("3", 0)),
                "10": node("BasicScheduler", model=("1", 0), denoise=0.3),
            },
            end_percent=0.5,
        ),
        "a part of the steps, and a sampler with steps of its own": with_nodes(
            {"4": node("KSamplerAdvanced", model=("3", 0), start_at_step=10)}, end_percent=0.5
        ),
        "some blocks": protected(blocks="d0-18, s3"),
        "image stream": protected(streams="image"),
        "a strength that rounds away": protected(strength=1e-4),
        "strengths that round away together": with_nodes(
            {"2": node("SafeRoPE_LoadConcept", concept=STAR, strength=0.2)}, strength=0.2
        ),
        "combined, taken apart": combined(orthogonalise=True),
        "combined with what is not known": combined() | {"7": node("StrangeConcept")},
        "combined, another row of inputs": combined()
        | {"8": node("SafeRoPE_CombineConcepts", concepts__concept0=("7", 0), concepts__star=("2", 0))},
        "combined, beyond the row": combined() | {"8": node("SafeRoPE_CombineConcepts", concepts__concept32=("2", 0))},
        "combined, a gap in the row": combined()
        | {"8": node("SafeRoPE_CombineConcepts", concepts__concept0=("7", 0), concepts__concept2=("2", 0))},
        "unknown loader before": with_nodes({"1": node("StrangeLoader")}),
        "unknown LoRA before": with_nodes({"7": node("StrangeLora", model=("1", 0))}, model=("7", 0)),
        "unknown LoRA after": with_nodes(
            {"7": node("StrangeLora", model=("3", 0)), "4": node("KSampler", model=("7", 0))}
        ),
        "unknown sampler behind Apply": with_nodes({"7": node("StrangeSampler", model=("3", 0))}),
        "unknown sampler alone": with_nodes({"4": node("StrangeSampler", model=("3", 0))}),
        "a loader of another family": with_nodes(
            {"7": node("PixArtCheckpointLoader"), "8": node("KSampler", model=("7", 0))}
        ),
        "an own type": with_nodes({"7": node("StrangeLoader"), "8": node("StrangeSampler", ray_actors=("7", 0))}),
        "an own type through a switch": with_nodes(
            {
                "7": node("StrangeLoader"),
                "9": node("ComfySwitchNode", on_true=("7", 0), on_false=("7", 0)),
                "8": node("StrangeSampler", pipe=("9", 0)),
            }
        ),
        "what is no model": protected(model=("2", 0)),
        "no Apply": with_nodes({"4": node("KSampler", model=("1", 0))}),
        "strength 0": protected(strength=0.0),
        "strength NaN": protected(strength=float("nan")),
        "strength a text": protected(strength="1"),
        "strength above the range": protected(strength=3.0),
        "strength is true": protected(strength=True),
        "strength by a primitive of 0": with_nodes({"7": node("PrimitiveFloat", value=0.0)}, strength=("7", 0)),
        "strength by an unknown node": with_nodes({"7": node("StrangeFloat", value=1.0)}, strength=("7", 0)),
        "concept's strength 0": with_nodes({"2": node("SafeRoPE_LoadConcept", concept=STAR, strength=0.0)}),
        "concept by an unknown node": with_nodes({"2": node("StrangeConcept")}),
        "no concept": protected(concept=None),
        "no model": protected(model=None),
        "concept's report": protected(concept=("2", 1)),
        "empty range": protected(start_percent=0.5, end_percent=0.5),
        "range backwards": protected(start_percent=0.6, end_percent=0.5),
        "range outside": protected(end_percent=1.5),
        "gate at 1": protected(gate="fixed", threshold=1.0),
        "unknown gate": protected(gate="open"),
        "blocks that are none": protected(blocks="all of them"),
        "unknown stream": protected(streams="neither"),
        "a pin that no file has": with_nodes({"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256="1234")}),
        "combined, both off": combined({"strength": 0.0})
        | {"2": node("SafeRoPE_LoadConcept", concept=STAR, strength=0.0)},
        "combined, nothing": with_nodes({"8": node("SafeRoPE_CombineConcepts")}, concept=("8", 0)),
        "merged, one protected": with_nodes(
            {
                "7": node("CheckpointLoaderSimple"),
                "9": node("ModelMergeSimple", model1=("3", 0), model2=("7", 0)),
                "4": node("KSampler", model=("9", 0)),
            }
        ),
        "merged with what is not there": with_nodes(
            {"9": node("ModelMergeSimple", model1=("3", 0), model2=("99", 0)), "4": node("KSampler", model=("9", 0))}
        ),
        "two samplers, one protected": with_nodes({"7": node("KSampler", model=("1", 0))}),
        "advanced": with_nodes({"7": node("KSamplerAdvanced", model=("1", 0))}),
        "custom": with_nodes({"7": node("SamplerCustom", model=("1", 0))}),
        "unknown sampler": with_nodes(
            {"4": node("StrangeSampler", model=("1", 0)), "7": node("KSampler", model=("3", 0))}
        ),
        "a sampler that passes its model on": with_nodes(
            {"7": node("StrangeSamplerThatPassesOn", model=("1", 0))}, model=("7", 0)
        )
        | {"9": node("VAEDecode", samples=("7", 1))},
        "unknown loader": with_nodes({"7": node("StrangeLoader"), "4": node("KSampler", model=("7", 0))}),
        "unknown LoRA alone": with_nodes(
            {"7": node("StrangeLora", model=("1", 0)), "4": node("KSampler", model=("7", 0))}
        ),
        "one side of a switch": with_nodes(
            {
                "9": node("ComfySwitchNode", on_true=("3", 0), on_false=("1", 0)),
                "4": node("KSampler", model=("9", 0)),
            }
        ),
        "negative pass of a dual guider": with_nodes(
            GUIDED | {"9": node("DualModelGuider", model=("3", 0), model_negative=("1", 0))}
        ),
        "no sampler": {"1": node("UNETLoader"), "5": node("VAEDecode")},
        "another family alone": {"1": node("PixArtCheckpointLoader"), "4": node("KSampler", model=("1", 0))},
        "a circle": with_nodes(
            {
                "7": node("ModelMergeSimple", model1=("3", 0), model2=("8", 0)),
                "8": node("LoraLoader", model=("7", 0)),
                "4": node("KSampler", model=("8", 0)),
            }
        ),
        "a sampler without a model": with_nodes({"7": node("KSampler", seed=3)}),
    }
    | {
        f"{guider}, positive only": with_nodes(
            GUIDED | {"9": node(guider, model=("3", 0))}, conditionings="positive only"
        )
        for guider in ("DualCFGGuider", "PerpNegGuider", "DualModelGuider")
    }
    | {
        guider: with_nodes(GUIDED | {"9": node(guider, model=("1", 0))})
        for guider in ("BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider")
    }
)


@pytest.mark.parametrize("name", SAFE)
def test_protected_in_every_form(name):
    assert verdicts(SAFE[name]) == everywhere(True)


@pytest.mark.parametrize("name", UNSAFE)
def test_not_protected_in_any_form(name):
    assert verdicts(UNSAFE[name]) == everywhere(False)


def test_a_missing_strength_is_no_strength():
    """ComfyUI refuses such a graph; in the editor's form the widget is always there."""
    assert not verdict(protected(strength=None)).protected


def test_the_report_names_path_and_reason():
    told = as_text("f", verdict(UNSAFE["merged, one protected"]))
    assert "f: does not ask for protection (API form)" in told
    assert "a path without an Apply that acts: CheckpointLoaderSimple 7 -> ModelMergeSimple 9 -> KSampler 4" in told
    assert "path: UNETLoader 1 -> SafeRoPE_Apply 3 -> ModelMergeSimple 9 -> KSampler 4" in told
    assert (
        "SafeRoPE_Apply 3 acts: strength 1, gate as calibrated, all steps, all blocks, both streams, all conditionings"
        in told
    )
    assert "concept star.safetensors, strength 1, not pinned" in told


def test_the_report_names_what_is_not_known_and_promises_nothing():
    told = as_text("f", verdict(UNSAFE["unknown LoRA before"]))
    assert "its model comes by StrangeLora 7, which is not known; put a node of ComfyUI's own" in told
    assert "StrangeLora 7: is not known, takes what may be a model, and may draw with it" in told
    told = as_text("f", verdict(SAFE["an unknown node that takes no model"]))
    assert told.startswith("f: asks for protection on every path (API form)\n")
    assert "cannot see it: StrangeFloat\n" in told and "a file cannot show that it ran" in told
    assert "was not looked at, only the settings of the workflow (--concepts FOLDER)" in told


@pytest.mark.parametrize(
    ("apply", "told"),
    [
        ({"strength": 0.5}, "concept 'star.safetensors' has strength 0.5"),
        ({"strength": 1.5}, "concept 'star.safetensors' has strength 1.5"),
        ({"end_percent": 0.8}, "only a part of the steps, 0 to 0.8"),
        ({"gate": "fixed", "threshold": 0.8}, "a fixed gate of 0.8"),
        ({"streams": "text"}, "only the text stream"),
        ({"conditionings": "positive only"}, "only the positive conditioning"),
    ],
)
def test_what_weakens_is_told_and_not_full(apply, told):
    assert f"weakened: {told}" in as_text("f", verdict(protected(**apply)))
    assert verdicts(protected(**apply)) == everywhere(True)
    assert verdicts(protected(**apply), Required(full=True)) == everywhere(False)
    assert verdicts(protected(), Required(full=True)) == everywhere(True)


def test_full_counts_the_product_of_strengths():
    both = with_nodes({"2": node("SafeRoPE_LoadConcept", concept=STAR, strength=0.5)}, strength=2.0)
    assert verdicts(both, Required(full=True)) == everywhere(True)
    both["3"]["inputs"]["strength"] = 1.9
    assert verdicts(both, Required(full=True)) == everywhere(False)


def test_a_concept_that_acts_twice_turns_twice_as_far():
    """Rotations are periodic: two Applies in a row, or one concept twice in a Combine, are not more than one."""
    again = node("SafeRoPE_Apply", model=("3", 0), concept=("2", 0), strength=1.0)
    row = with_nodes({"7": again, "4": node("KSampler", model=("7", 0))})
    twice = combined({"concept": STAR})
    pinned = combined({"sha256": PIN}) | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)}
    for prompt in (twice, pinned):
        assert verdicts(prompt) == everywhere(True), "ComfyUI holds copies in one Apply together"
        assert verdicts(prompt, Required(full=True)) == everywhere(False)
    assert verdicts(row) == everywhere(False)
    assert verdicts(combined(), Required(full=True)) == everywhere(True)
    assert verdicts(SAFE["merged, both protected"], Required(full=True)) == everywhere(True), (
        "side by side, not in a row"
    )


def test_required_pins():
    pinned = with_nodes({"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=f" {PIN.upper()} ")})
    assert verdicts(pinned, Required((PIN,))) == everywhere(True)
    assert verdicts(pinned, Required((OTHER_PIN,))) == everywhere(False)
    assert verdicts(pinned, Required((PIN, OTHER_PIN))) == everywhere(False)
    assert verdicts(protected(), Required((PIN,))) == everywhere(False)
    assert f"star.safetensors, strength 1, pinned to sha256 {PIN}" in as_text("f", verdict(pinned))
    both = combined({"sha256": PIN}) | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=OTHER_PIN)}
    assert verdicts(both, Required((PIN, OTHER_PIN))) == everywhere(True)
    off = combined({"sha256": PIN, "strength": 0.0})
    assert verdicts(off) == everywhere(True) and verdicts(off, Required((PIN,))) == everywhere(False)


def test_what_is_not_required_may_turn_back_what_is():
    """Without its file, another concept may be the inverse of the pinned one."""
    stranger = combined() | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)}
    assert verdicts(stranger) == everywhere(True)
    assert verdicts(stranger, Required((PIN,))) == everywhere(False)
    assert "'moon.safetensors' is not pinned to one of the required files" in as_text(
        "f", verdict(stranger, Required((PIN,)))
    )
    row = with_nodes(
        {
            "2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN),
            "8": node("SafeRoPE_LoadConcept", concept="moon.safetensors"),
            "7": node("SafeRoPE_Apply", model=("3", 0), concept=("8", 0), strength=1.0),
            "4": node("KSampler", model=("7", 0)),
        }
    )
    assert verdicts(row) == everywhere(True) and verdicts(row, Required((PIN,))) == everywhere(False)


@pytest.mark.parametrize(
    ("apply", "answer"),
    [
        ({"strength": 1.0, "start_percent": 0.01}, False),
        ({"strength": 1.0, "blocks": "s0"}, False),
        ({"strength": ("7", 0)}, False),
        ({"strength": 0.0}, True),
        ({"strength": 1.0, "end_percent": 0.0}, True),
        ({"strength": 1.0, "gate": "fixed", "threshold": 1.0}, True),
    ],
    ids=str,
)
def test_an_apply_that_may_act_or_not_may_turn_back_what_another_turns(apply, answer):
    """Not counted as protection, it still runs; one that surely changes nothing does not matter."""
    second = node("SafeRoPE_Apply", model=("3", 0), concept=("9", 0), **apply)
    row = {"8": second, "9": node("SafeRoPE_LoadConcept", concept="moon.safetensors"), "7": node("StrangeFloat")}
    prompt = with_nodes(row | {"4": node("KSampler", model=("8", 0), denoise=1.0)})
    prompt["2"] = node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)
    assert verdicts(prompt) == verdicts(prompt, Required((PIN,), full=True)) == everywhere(answer)


def test_a_small_strength_says_little_of_a_file_that_is_not_at_hand():
    """Its own may be 100."""
    prompt = combined({"strength": 0.01}) | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)}
    assert verdicts(prompt, Required((PIN,))) == everywhere(False)
    assert verdicts(combined({"strength": 0.0}) | {"2": prompt["2"]}, Required((PIN,))) == everywhere(True)


def test_a_pin_counts_only_where_it_is_on_every_path():
    two = SAFE["merged, both protected"] | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)}
    assert verdicts(two, Required((PIN,))) == everywhere(True)
    two = two | {"10": node("SafeRoPE_LoadConcept", concept="moon.safetensors", sha256=OTHER_PIN)}
    two["8"] = node("SafeRoPE_Apply", model=("7", 0), concept=("10", 0), strength=1.0)
    assert verdicts(two) == everywhere(True) and verdicts(two, Required((PIN,))) == everywhere(False)


def test_a_full_and_a_pinned_apply_are_not_a_full_pinned_one():
    prompt = with_nodes(
        {
            "2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN),
            "8": node("SafeRoPE_LoadConcept", concept="moon.safetensors", sha256=OTHER_PIN),
            "7": node("SafeRoPE_Apply", model=("3", 0), concept=("8", 0), strength=1.0),
            "4": node("KSampler", model=("7", 0), denoise=1.0),
        },
        end_percent=0.1,
    )
    both = (PIN, OTHER_PIN)
    assert verdicts(prompt, Required(both)) == verdicts(prompt, Required(full=True)) == everywhere(True)
    assert verdicts(prompt, Required(both, full=True)) == everywhere(False)


def api(prompt):
    """The verdict on an API form alone, in words too."""
    found = verdict(prompt)
    return found.protected, as_text("f", found)


@pytest.mark.parametrize(
    "link",
    [["1", False], ["1", -3], ["1", 0.0], [1, 0], ["1", 0, 0], {"__value__": ["1", 0]}, {"__value__": 1.0}, ["1"], "1"],
    ids=str,
)
def test_only_plain_links_bring_a_model(link):
    """In front of Apply, past it, and beside it in a merge."""
    places = [
        protected(model=link),
        with_nodes({"4": node("KSampler", model=link)}),
        with_nodes(
            {"7": node("ModelMergeSimple", model1=link, model2=("3", 0)), "4": node("KSampler", model=("7", 0))}
        ),
        with_nodes(
            {"9": node("ComfySwitchNode", on_true=link, on_false=("3", 0)), "4": node("KSampler", model=("9", 0))}
        ),
    ]
    if isinstance(link, str):
        places.pop()  # a constant into a switch is no model
    for prompt in places:
        safe, told = api(prompt)
        assert not safe, told
    for prompt in (protected(model=["1", 0]), with_nodes({"4": node("KSampler", model=["3", 0])})):
        assert api(prompt)[0]


def test_a_primitive_passes_on_only_what_it_does_not_change():
    """ComfyUI makes an integer of 0.9 on the way: it runs 0."""
    for value, answer in ((1, True), (0.9, False)):
        prompt = with_nodes({"7": node("PrimitiveInt", value=value)}, strength=("7", 0))
        assert api(prompt)[0] is answer


def test_nothing_hangs_where_paths_are_countless():
    """60 merges in a row, each of one model with itself over two LoRAs: 2^60 paths, of which not even a part can be
    walked.
    """
    prompt, last = protected(), "1"
    for step in range(60):
        a, b, c = (str(100 + 3 * step + i) for i in range(3))
        prompt |= {a: node("LoraLoader", model=(last, 0)), b: node("LoraLoader", model=(last, 0))}
        prompt[c] = node("ModelMergeSimple", model1=(a, 0), model2=(b, 0))
        last = c
    prompt["3"]["inputs"]["model"] = [last, 0]
    assert verdicts(prompt) == everywhere(True)
    prompt["4"]["inputs"]["model"] = [last, 0]
    assert verdicts(prompt) == everywhere(False)
    assert "and more paths" in as_text("f", verdict(prompt))


def test_concepts_combined_again_and_again_do_not_hang():
    """30^20 concepts, if all were counted."""
    prompt = protected(concept=("39", 0)) | {
        str(20 + step): node(
            "SafeRoPE_CombineConcepts",
            **{f"concepts.concept{i}": (str(19 + step) if step else "2", 0) for i in range(30)},
        )
        for step in range(20)
    }
    assert verdicts(prompt) == everywhere(False)
    assert "more than 64 concepts" in as_text("f", verdict(prompt))
