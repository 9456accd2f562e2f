"""What the nodes offer to people: few inputs at first sight, and names that people search by."""

import json

import pytest

from dev.comfyui import ROOT

pytestmark = pytest.mark.host

FIRST_SIGHT = {
    "Apply": {"model", "concept", "strength"},
    "CalibrateConcept": {"model", "clip", "name", "unsafe", "safe", "latent", "preset", "style", "vae"},
}


def inputs(node_classes, name):
    """Options of the node's inputs by their names, in order, as ComfyUI hands them to its page."""
    offered = node_classes[f"SafeRoPE_{name}"].INPUT_TYPES()
    return {key: spec[1] for group in ("required", "optional") for key, spec in offered.get(group, {}).items()}


def quiet(offered):
    return {name for name, options in offered.items() if not options.get("advanced")}


@pytest.mark.parametrize("name", FIRST_SIGHT)
def test_expert_inputs_are_folded(node_classes, name):
    assert quiet(inputs(node_classes, name)) == FIRST_SIGHT[name]
    assert quiet({"plain": {}, "expert": {"advanced": True}}) == {"plain"}, "control: both kinds are told apart"


def test_folded_inputs_keep_the_places_that_saved_workflows_give_them(node_classes):
    """Workflows hold widgets by their places."""
    before = "model concept strength gate threshold start_percent end_percent blocks streams conditionings record"
    assert list(inputs(node_classes, "Apply")) == before.split()
    before = "model clip name unsafe safe latent rounds angle quantile rank cut turned turned_image timesteps seed"
    assert list(inputs(node_classes, "CalibrateConcept")) == [*before.split(), "guidance", "preset", "style", "vae"]


def test_boxes_for_prompts_are_empty_and_say_how_to_fill_them(node_classes):
    for side in ("unsafe", "safe"):
        options = inputs(node_classes, "CalibrateConcept")[side]
        assert options["default"] == "" and "one a line" in options["placeholder"]


WORDS = "censor protect nude gore style block filter safety nsfw 安全 色情 裸 审查 ヌード 検閲".split()


@pytest.mark.parametrize("name", ["LoadConcept", "Apply", "CalibrateConcept", "RiskProbe"])
def test_nodes_are_found_in_three_languages(node_classes, name):
    aliases = node_classes[f"SafeRoPE_{name}"].GET_NODE_INFO_V1()["search_aliases"]
    assert [word for word in WORDS if word not in aliases] == []
    assert len(aliases) == len(set(aliases)) and "upscale" not in aliases


SAME_EVERYWHERE = {("LoadConcept", "concept"), ("SaveImage", "format")}  # names of files, and PNG, JPEG, WEBP
FILES_ARE_FOR = ["tiny world"]  # a translated word behind a file's name; FLUX.1 is one in every language


def lists(node_classes):
    """The choices of every list of every node, by the node's and the list's name."""
    names = [each.removeprefix("SafeRoPE_") for each in node_classes]
    offered = {(name, key): each.get("options") for name in names for key, each in inputs(node_classes, name).items()}
    return {at: list(choices) for at, choices in offered.items() if choices}


def untranslated(texts, wanted):
    """Choices without words, words without a choice, and choices that a tooltip names as the API has them."""
    found = []
    for (node, name), choices in wanted.items():
        here = texts[f"SafeRoPE_{node}"]["inputs"][name]
        words = here.get("options", {})
        plain = [choice for choice in words if len(choice.split()) > 1 and choice in here["tooltip"]]
        found += [(node, name, choice) for choice in [*({*words} ^ {*choices}), *plain]]
    return found


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_choices_are_translated(node_classes, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    wanted = {at: choices for at, choices in lists(node_classes).items() if at not in SAME_EVERYWHERE}
    wanted |= {("LoadConcept", "concept"): FILES_ARE_FOR}
    assert len(wanted) > 8 and untranslated(texts, wanted) == []
    del texts["SafeRoPE_Apply"]["inputs"]["gate"]["options"]["fixed"]
    texts["SafeRoPE_Apply"]["inputs"]["conditionings"]["tooltip"] = "positive only ..."
    bad = [("Apply", "gate", "fixed"), ("Apply", "conditionings", "positive only")]
    assert sorted(untranslated(texts, wanted)) == sorted(bad), "control"
