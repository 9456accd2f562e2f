"""What a protection saw, against counting in loops."""

import pytest
import torch

from saferope_core import Forward, Protection, Run, latent_risk_score
from saferope_core.run import protection

TEXT, IMAGE, GRID = (0, 4), (4, 11), (2, 3)  # the last image token belongs to a reference picture
SHAPE = (2, 3, 11, 32)
BLOCKS = [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)]


@pytest.fixture(params=["gathered", "dense", "plain", "fused"])
def path(request, monkeypatch):
    monkeypatch.setattr(protection, "form_of", lambda x: request.param)


def recorded(guard, steps, entries=("a", "b"), rows=None):
    """A run over some steps; steps[n][role, block] are q or k [B, H, L, D]."""
    run = Run(guard.geometry)
    for number, vectors in enumerate(steps):
        forward = Forward(entries, 1.0 - 0.25 * number, GRID)
        for (role, block), x in vectors.items():
            guard.rotate(x, role, *block, TEXT, IMAGE, seen=forward)
        run.add(forward)
    return run


def steps_of(count):
    return [{(role, block): torch.randn(SHAPE) for role in "qk" for block in BLOCKS} for _ in range(count)]


def counted(concept, vectors, row, stream, span, clear):
    """Share of gates that each token of batch row `row` passes, and the heads that pass it, in loops."""
    passed, gates, heads = torch.zeros(span[1] - span[0]), 0, {}
    for role in "qk":
        for place, (kind, block, head) in enumerate(concept.heads.tolist()):
            x = vectors[role, (("double", "single")[kind], block)][row, head, span[0] : span[1]]
            risk = latent_risk_score(x[None], concept.basis(role, stream)[place][None])[0]
            assert (risk - concept.threshold).abs().min() > clear, "choose other examples: here rounding decides"
            hit = risk > concept.threshold
            passed += hit
            gates += 1
            key = (kind * 2 + block, head)
            heads[key] = heads.get(key, 0) + hit.float() / 2
    return passed / gates, heads


def test_equals_counting_in_loops(path, make_concept, geometry, clear):
    concept, steps = make_concept(), steps_of(3)
    run = recorded(Protection([concept], geometry), steps)
    first, second = run.readings(0)
    assert (first.entry, second.entry) == ("a", "b")
    for row, reading in enumerate((first, second)):
        for number, vectors in enumerate(steps):
            text, _ = counted(concept, vectors, row, "text", TEXT, clear)
            image, _ = counted(concept, vectors, row, "image", (4, 10), clear)
            torch.testing.assert_close(reading.text[number, 0], text)
            torch.testing.assert_close(reading.image[number, 0], image)
        riskiest = reading.tokens[0].argmax()
        assert reading.score == reading.tokens.max() and 0 < reading.score < 1
        found = [counted(concept, vectors, row, "text", TEXT, clear)[1] for vectors in steps]
        for place in concept.heads.tolist():
            key = (place[0] * 2 + place[1], place[2])
            share = sum(heads[key][riskiest] for heads in found) / len(found)
            torch.testing.assert_close(reading.heads[0][key], share)
        assert reading.heads[0].isnan().sum() == reading.heads[0].numel() - len(concept.heads), (
            "who has no gate is not 0"
        )
    assert not torch.equal(first.text, second.text), "negative control: rows are told apart"
    assert first.noise_levels.tolist() == [1.0, 0.75, 0.5] and first.grid == GRID


def test_concepts_are_told_apart_in_heads_that_they_share(path, make_concept, geometry):
    """Each counts its own gates alone, whatever else is turned beside it."""
    one = make_concept()
    other = make_concept("zappy", rank=8, heads=[(0, 0, 1), (1, 1, 1), (1, 1, 2)], threshold=0.25)
    idle = make_concept("swirl", strength=0.0)
    steps = steps_of(1)
    both = recorded(Protection([idle, one, other], geometry), steps)
    for number, concept in ((1, one), (2, other)):
        alone = recorded(Protection([concept], geometry), steps)
        for reading, expected in zip(both.readings(number), alone.readings(0), strict=True):
            torch.testing.assert_close(reading.text, expected.text)
            torch.testing.assert_close(reading.heads, expected.heads, equal_nan=True)
    assert not torch.equal(both.readings(1)[0].text, both.readings(2)[0].text)
    for reading in both.readings(0):
        assert reading.score is reading.tokens is reading.patches is reading.heads is None, "off: not a risk of 0"


@pytest.mark.parametrize("stream", ["text", "image"])
def test_a_stream_without_gates_has_no_risk(make_concept, geometry, stream):
    concept = make_concept(**{f"generator_{stream}": torch.zeros(6, 5, 5)})
    (reading, _) = recorded(Protection([concept], geometry), steps_of(2)).readings(0)
    without = {"text": reading.tokens, "image": reading.patches}
    assert without.pop(stream) is None and all(risk.max() > 0 for risk in without.values())
    assert (reading.score is None) == (reading.heads is None) == (stream == "text")


@pytest.mark.parametrize("others", [0, 1])
def test_a_gate_of_1_is_not_asked(path, make_concept, geometry, others):
    """No token can be above it. Just below it is asked, and a risk of 0 where no token passes."""
    beside, steps = [make_concept("zappy", rank=8)] * others, steps_of(1)
    (never, _), (asked, _) = (
        recorded(Protection([make_concept(threshold=gate), *beside], geometry), steps).readings(0)
        for gate in (1.0, 0.999)
    )
    assert never.text is never.image is never.heads is None
    assert asked.score == 0 and not asked.patches.any() and not asked.heads.nansum(), "control"
    gates = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    concept = make_concept(gate_q=gates, gate_k=gates)
    (some, _) = recorded(Protection([concept, *beside], geometry), steps).readings(0)
    assert some.text.eq(1).all(), "all of 10 gates, not 10 of 12"
    assert some.heads[0, 3].nan_to_num(-1).tolist() == [1, -1, 1]


def test_steps_without_protection_dilute_no_risk(make_concept, geometry):
    """Outside of the range of an Apply node the forward is recorded, but nobody looks."""
    steps, guard = steps_of(2), Protection([make_concept()], geometry)
    (half, _), (alone, _) = (recorded(guard, some).readings(0) for some in ([steps[0], {}], steps[:1]))
    assert half.text[0].any() and half.text[1].isnan().all() and len(half.noise_levels) == 2
    for name in ("tokens", "patches", "score", "heads"):
        torch.testing.assert_close(getattr(half, name), getattr(alone, name), rtol=0, atol=0, equal_nan=True)
    (none, _) = recorded(guard, [{}, {}]).readings(0)
    assert none.text is none.image is none.score is None
    (both, _) = recorded(guard, steps).readings(0)
    assert not torch.equal(both.tokens, alone.tokens), "negative control: a step that was measured counts"


def test_rotations_are_the_same_with_and_without_a_listener(path, make_concept, geometry):
    guard, x = Protection([make_concept()], geometry), torch.randn(SHAPE)
    told, silent = Forward(["a"], 1.0, GRID), Forward(["a"], 1.0, GRID)
    heard = guard.rotate(x, "q", "single", 1, TEXT, IMAGE, seen=told)
    assert torch.equal(heard, guard.rotate(x, "q", "single", 1, TEXT, IMAGE)) and len(told.tallies) == 2
    guard.rotate(x, "q", "single", 0, TEXT, IMAGE, seen=silent)
    assert not silent.tallies, "a block without safety-critical heads has nothing to tell"
