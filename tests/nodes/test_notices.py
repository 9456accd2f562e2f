"""What was asked for and will not be done is said: in the log, and on the node that runs."""

import importlib
import logging

import pytest
import torch

from tests.support import concepts as flat

pytestmark = pytest.mark.host


@pytest.fixture
def said(apply, flux, caplog):
    """said([concept], strength, ...) -> what Apply says, a sentence a line."""

    def ask(concepts, strength=1.0, **chosen):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            apply(flux, concepts, strength, **chosen)
        return [record.getMessage() for record in caplog.records]

    return ask


@pytest.fixture(scope="module")
def doubles(make_concept):
    """A concept whose heads are all in double blocks."""
    whole = make_concept(slug="doubles", seed=1)
    fields = ("heads", "basis_q", "basis_k", "generator_text", "generator_image")
    return flat.changed(whole, **{name: flat.field(whole, name)[:2] for name in fields})


@pytest.fixture(scope="module")
def gentle(core, make_concept):
    """A concept that turns by 2.1 rad, as the bundled swirl."""
    generators = {f"generator_{stream}": core.fixed_generator(4, 2.1, 4) for stream in ("text", "image")}
    return make_concept(slug="gentle", **generators)


@pytest.fixture(scope="module")
def wide(gentle):
    """The same, made with twice the angles: past half a turn."""
    return flat.changed(
        gentle,
        slug="wide",
        generator_text=2 * gentle.text.generator,
        generator_image=2 * flat.field(gentle, "generator_image"),
    )


def test_a_concept_with_nothing_to_turn_is_named(said, concept, doubles):
    (one,) = said([concept, doubles], blocks="s0-1")
    assert "concept 'doubles' has nothing to turn in the chosen blocks and streams: it is not suppressed" in one
    assert said([concept, doubles], blocks="d0") == [], "control: there both have"


def test_a_stream_without_the_concept_is_named(said, concept, make_concept):
    textual = make_concept(slug="textual", seed=1, generator_image=torch.zeros(4, 4, 4))
    (one,) = said([concept, textual], streams="image")
    assert "'textual'" in one and said([concept, textual], streams="text") == []


def test_a_concept_with_nothing_left_at_all_is_named(said, doubles):
    (one,) = said([doubles], blocks="s0-1")
    assert "'doubles'" in one


def test_no_step_and_a_closed_gate_are_told(said, concept):
    assert "both 0.5: nothing is suppressed in any step" in said([concept], start_percent=0.5, end_percent=0.5)[0]
    assert "fixed at 1, which no token passes" in said([concept], gate="fixed", threshold=1.0)[0]
    assert said([concept], threshold=1.0) == [], "control: not read with the concept's own gates"


def test_strength_0_is_what_was_asked_for(said, concept, doubles):
    assert said([doubles], 0.0, blocks="s0-1", start_percent=0.5, end_percent=0.5) == []
    assert said([flat.changed(doubles, strength=0.0), concept], blocks="s0-1") == []


def test_a_strength_that_is_held_is_told_once_each(said, gentle, wide):
    """Load 2 x Apply 1.5. The angles of `gentle` saturate below half a turn, so that nothing is held."""
    (one,) = said([flat.changed(wide, strength=2.0), flat.changed(gentle, **flipped(gentle), strength=2.0)], 1.5)
    assert "concept 'wide': strength 3 acts as 1." in one
    assert said([gentle], 2.0) == [] and said([wide], 1.0) == []


def flipped(concept):
    """Bases of other heads, so that the concept is nobody's copy."""
    return {f"basis_{role}": getattr(concept.text.basis, role).flip(0) for role in "qk"}


def test_held_strengths_paint_the_picture_of_strength_1(apply, flux, sample, wide):
    held, made, less = (sample(apply(flux, [wide], strength)) for strength in (1.5, 1.0, 0.9))
    assert torch.equal(held, made)
    assert (less - made).abs().max() > 1e-4, "control: another strength shows"


def test_a_second_node_may_not_turn_a_concept_past_half_a_turn(apply, flux, gentle, concept):
    once = apply(flux, [gentle], 1.0)
    with pytest.raises(
        ValueError, match="'gentle' is turned by another SafeRoPE Apply before this one in the same steps"
    ):
        apply(once, [gentle], 1.0)
    for part in ({"streams": "text"}, {"blocks": "d0-1"}):
        with pytest.raises(ValueError, match="turned by another SafeRoPE Apply"):
            apply(once, [gentle], 1.0, **part)
    for other in ({"strength": 0.4}, {"strength": 0.0}):
        apply(once, [gentle], **other)
    apply(once, [concept], 1.0)
    apply(apply(flux, [gentle], 1.0, end_percent=0.5), [gentle], 1.0, start_percent=0.5)
    apply(apply(flux, [gentle], 1.0, blocks="d0-1"), [gentle], 1.0, blocks="s0-1")


def test_notices_stand_on_the_node_until_it_runs_again(pack, monkeypatch):
    """Sentences of one run stand together; the next run takes them back, for the page takes no empty text."""
    from comfy_execution.utils import CurrentNodeContext

    notices, shown = importlib.import_module(f"{pack.__name__}.nodes.host.notices"), []
    monkeypatch.setattr(notices, "_show", lambda node, text: shown.append((node, text)))
    with CurrentNodeContext("prompt", "7"):
        notices.start_notices()
        for sentence in ("one", "two", "one"):
            notices.notice(sentence)
        with CurrentNodeContext("prompt", "8"):
            notices.start_notices()
        notices.start_notices()
        notices.start_notices()
    assert shown == [("7", "one"), ("7", "one\ntwo"), ("7", "one\ntwo"), ("7", notices.NONE)]
