"""What a concept does, as opposed to what it is: told by Load, Inspect, Combine and Apply."""

import logging

import pytest
import torch

from tests.support import concepts as flat

pytestmark = pytest.mark.host


@pytest.fixture
def idle(concept):
    """Well-formed concepts that do nothing, by what is wrong with them."""
    count = len(concept.heads)
    ones = dict.fromkeys(("gate_q", "gate_k"), torch.ones(count))
    tiny = {f"generator_{each}": 1e-6 * concept.generator(each) for each in ("text", "image")}
    zero = {name: torch.zeros_like(each) for name, each in tiny.items()}
    return {what: flat.changed(concept, **by) for what, by in (("gates", ones), ("angles", tiny), ("nothing", zero))}


def inverse(concept):
    turned = {f"generator_{each}": -concept.generator(each) for each in ("text", "image")}
    return flat.changed(concept, slug="decoy", name="decoy", **turned)


def test_load_tells_what_a_file_does(node_classes):
    told = node_classes["SafeRoPE_LoadConcept"].execute("star.safetensors")[1]
    off = node_classes["SafeRoPE_LoadConcept"].execute("star.safetensors", strength=0.0)[1]
    assert "by itself it turns in 12 of 12 heads" in told and "turns in 0 of 12 heads" in off


@pytest.mark.parametrize("strength", [0.05, 1.0])
@pytest.mark.parametrize("what", ["gates", "angles", "nothing"])
def test_a_concept_without_effect_is_refused(node_classes, core, apply, flux, concept, idle, what, strength):
    assert core.effect_of(concept).turning == 4 and core.effect_of(idle[what]).turning == 0
    assert "turns in 0 of 4 heads" in node_classes["SafeRoPE_InspectConcept"].execute([idle[what]])[2]
    for concepts in ([idle[what]], [flat.changed(concept, slug="other", name="other"), idle[what]]):
        with pytest.raises(
            ValueError, match=r"Concept 'star' has no effect.*0 of 4 heads.*Expected.*set strength to 0"
        ):
            apply(flux, concepts, strength)
    apply(flux, [concept], strength)  # control: less than the least turn at this strength is no empty concept


@pytest.mark.parametrize("what", ["gates", "angles", "nothing"])
def test_strength_0_asks_for_nothing(apply, flux, idle, what):
    for concept, strength in ((idle[what], 0.0), (flat.changed(idle[what], strength=0.0), 1.0)):
        assert "patches" not in apply(flux, [concept], strength).model_options["transformer_options"]


def test_a_fixed_gate_takes_the_place_of_gates_that_nothing_passes(apply, flux, idle):
    apply(flux, [idle["gates"]], 1.0, gate="fixed", threshold=0.2)
    with pytest.raises(ValueError, match="has no effect"):
        apply(flux, [idle["angles"]], 1.0, gate="fixed", threshold=0.2)


def test_settings_without_effect_are_told(apply, flux, concept, caplog):
    with caplog.at_level(logging.WARNING):
        apply(flux, [concept], 1.0)
        assert "turns nothing" not in caplog.text, "control"
        apply(flux, [concept], 0.001)
    assert "concept 'star' turns nothing" in caplog.text


def test_concepts_that_cancel_are_named(node_classes, apply, flux, concept, make_concept, caplog):
    combine = node_classes["SafeRoPE_CombineConcepts"]
    told = combine.execute({"a": [concept], "b": [inverse(concept)]})[1]
    assert "concept 'star' is turned back by 'decoy' in 4 of its 4 heads" in told
    other = combine.execute({"a": [concept], "b": [make_concept(slug="other", seed=1)]})[1]
    assert "turned back" not in other, "control"
    with caplog.at_level(logging.WARNING):
        apply(apply(flux, [concept], 1.0), [inverse(concept)], 1.0)
    assert "'star' is turned back by 'decoy'" in caplog.text


def test_one_of_three_is_named(core, concept, make_concept):
    three = [concept, make_concept(slug="other", seed=1), inverse(concept)]
    found = core.undone([core.Protection(three, concept.geometry)])
    assert found and all("'other'" not in each.split("turned back by")[1] for each in found if "'star' is" in each)
