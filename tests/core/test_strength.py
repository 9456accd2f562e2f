"""More strength turns weaker risk further, and nothing further than the full angle; copies share half a turn."""

import math

import pytest
import torch

from saferope_core import Protection, fixed_generator, held_strengths, orthonormal, strength_notes
from tests.support import concepts as flat

ROLE, BLOCK = "k", ("single", 1)
SWIRL = 2.1  # radians at strength 1, as the bundled swirl: three times as much is a whole turn
WIDE = 20.7  # radians, as the bundled star: several turns as it was made


def turning(make_concept, angle, slug="star", **fields):
    """A concept whose planes turn by `angle`, image tokens by half of it."""
    rank = 4
    text, image = (fixed_generator(rank, part, 6) for part in (angle, angle / 2))
    return make_concept(slug, rank=rank, threshold=0.0, **{"generator_text": text, "generator_image": image, **fields})


def inside(concept, seed=0):
    """Text tokens [1, 3, 8, 32] that lie wholly in the unsafe subspaces of the block's heads: LRS 1."""
    basis = concept.basis(ROLE)[concept.heads[:, 0].eq(1)]
    return torch.einsum("hdr,hlr->hld", basis, torch.randn(3, 8, basis.shape[-1]))[None]


def rotated(protection, x):
    return protection.rotate(x, ROLE, *BLOCK, (0, x.shape[2]), (x.shape[2], x.shape[2]))


def cosines(x, y):
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("angle", [SWIRL, WIDE])
def test_up_to_as_made_a_strength_is_what_it_is(make_concept, geometry, angle, strength):
    concept = turning(make_concept, angle)
    assert held_strengths([concept], [strength]) == (strength,)
    assert not strength_notes([concept], [strength])
    assert Protection([concept], geometry, [strength]).effective == (strength,)


def at_risk(concept, risk, seed=0):
    """Tokens [1, 3, 8, 32] of this LRS, half of their rest left for a direction outside of the subspace."""
    x = torch.nn.functional.normalize(inside(concept, seed), dim=-1)
    basis = concept.basis(ROLE)[concept.heads[:, 0].eq(1)]
    outside = torch.linalg.qr(basis, mode="complete").Q[..., -1][None, :, None]
    return risk**0.5 * x + (1 - risk) ** 0.5 * outside


def swept(concept, geometry, strength, risk):
    """The angle by which the risky part of tokens turns, measured inside of the subspace."""
    x = at_risk(concept, risk)
    basis = concept.basis(ROLE)[concept.heads[:, 0].eq(1)]
    before, after = (
        torch.einsum("hdr,bhld->bhlr", basis, each).double()
        for each in (x, rotated(Protection([concept], geometry, [strength]), x))
    )
    return cosines(before, after).clamp(-1, 1).acos()


@pytest.mark.parametrize("risk", [0.3, 0.8, 1.0])
@pytest.mark.parametrize(("own", "factor"), [(1.0, 0.5), (1.0, 1.0), (1.0, 1.5), (2.0, 2.0), (100.0, 100.0)])
def test_the_angle_is_the_saturated_risk_times_the_full_angle(make_concept, geometry, own, factor, risk):
    """s = min(1, strength * LRS), the product of both strengths before it saturates."""
    concept = turning(make_concept, SWIRL, strength=own)
    expected = SWIRL * min(1.0, own * factor * risk)
    torch.testing.assert_close(
        swept(concept, geometry, factor, risk), torch.full((1, 3, 8), expected).double(), rtol=0, atol=2e-3
    )
    assert Protection([concept], geometry, [factor]).effective == (own * factor,)
    assert not strength_notes([concept], [own * factor])


@pytest.mark.parametrize("risk", [0.2, 0.6, 1.0])
def test_more_strength_never_turns_less(make_concept, geometry, risk):
    concept = turning(make_concept, math.pi)
    courses = torch.stack([swept(concept, geometry, step / 4, risk) for step in range(9)])
    assert (courses.diff(dim=0) >= -2e-3).all() and courses.amax() <= math.pi
    wide = flat.changed(concept, generator_text=concept.text.generator * 2)
    falls = torch.stack([swept(wide, geometry, step / 4, 1.0) for step in range(5)]).diff(dim=0)
    assert (falls < -0.1).any(), "control: past half a turn more is less"


def test_a_negative_strength_turns_the_other_way(make_concept, geometry):
    concept = turning(make_concept, SWIRL)
    x = at_risk(concept, 0.8)
    there = rotated(Protection([concept], geometry, [0.7]), x)
    back = rotated(Protection([concept], geometry, [-0.7]), there)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    assert (there - x).abs().max() > 0.1, "control"


def test_a_whole_turn_would_be_no_protection(make_concept, geometry):
    """The control of all of these: angles made that wide, where nobody can tell them from others."""
    concept = turning(make_concept, SWIRL)
    whole = flat.changed(concept, generator_text=concept.text.generator * (2 * math.pi / SWIRL))
    x = inside(concept)
    assert cosines(rotated(Protection([whole], geometry), x), x).min() > 0.999
    assert cosines(rotated(Protection([concept], geometry, [2 * math.pi / SWIRL]), x), x).max() < -0.5


@pytest.mark.parametrize("angle", [1.05 * math.pi, WIDE])
def test_a_concept_made_with_wider_angles_stays_as_it_was_made_and_goes_no_further(make_concept, geometry, angle):
    concept = turning(make_concept, angle)
    x, made = at_risk(concept, 0.9), Protection([concept], geometry)
    for strength in (1.0, 1.05, 2.0, 4.0):
        held = Protection([concept], geometry, [strength])
        assert held.effective == (1.0,) and torch.equal(rotated(held, x), rotated(made, x))
        assert bool(strength_notes([concept], [strength])) == (strength > 1)
    assert held_strengths([concept], [-2.0]) == (-1.0,)
    assert not torch.equal(rotated(Protection([concept], geometry, [0.9]), x), rotated(made, x)), "control: it turns x"


@pytest.mark.parametrize("stream", ["text", "image"])
def test_the_widest_angle_of_any_head_and_stream_counts(make_concept, stream):
    fields = {f"generator_{each}": fixed_generator(4, 0.1, 6) for each in ("text", "image")}
    fields[f"generator_{stream}"][5] = fixed_generator(4, WIDE, 1)[0]
    assert held_strengths([turning(make_concept, SWIRL, **fields)], [2.0]) == (1.0,)
    fields[f"generator_{stream}"][5] = fixed_generator(4, 0.1, 1)[0]
    assert held_strengths([turning(make_concept, SWIRL, **fields)], [2.0]) == (2.0,), "control: without it 2 is 2"


def test_half_a_turn_in_float16_is_half_a_turn(make_concept):
    for angle in (math.pi, 1.004 * math.pi):
        assert held_strengths([halved(turning(make_concept, angle))], [2.0]) == (2.0,)


def test_what_turns_nothing_may_have_any_strength(make_concept):
    still = turning(make_concept, 0.0)
    assert held_strengths([still], [100.0]) == (100.0,) and held_strengths([still, still], [3.0, 2.0]) == (3.0, 2.0)


def test_copies_of_one_concept_are_held_together(make_concept, geometry):
    """Three times 2.1 rad one after the other are a whole turn as well, whatever the copies are called."""
    concept = turning(make_concept, SWIRL)
    copies = [concept, flat.changed(concept, slug="copy"), flat.changed(concept, name="Third")]
    protection, x = Protection(copies, geometry), inside(concept)
    assert sum(protection.effective) == pytest.approx(math.pi / SWIRL) and len(set(protection.effective)) == 1
    assert cosines(rotated(protection, x), x).max() < -0.999
    assert len(strength_notes(copies, [1.0] * 3)) == 3
    one_by_one = x
    for each in copies:
        one_by_one = rotated(Protection([each], geometry), one_by_one)
    assert cosines(one_by_one, x).min() > 0.99, "control: each by itself they add up to a whole turn"


def test_other_concepts_do_not_share_what_is_allowed(make_concept):
    """Of other planes, other heads, or other roles."""
    concept = turning(make_concept, SWIRL, acts_on="k")
    others = [
        turning(make_concept, SWIRL),
        turning(
            make_concept,
            SWIRL,
            heads=[(0, 0, 0)],
            generator_text=fixed_generator(4, SWIRL, 1),
            generator_image=fixed_generator(4, SWIRL, 1),
        ),
    ]
    others += [flat.changed(concept, acts_on="q")]
    assert held_strengths([concept, *others], [1.0] * 4) == (1.0,) * 4


def halved(concept):
    """What a float16 file gives back of it."""
    fields = ("basis_q", "basis_k", "generator_text", "generator_image")
    changed = {name: flat.field(concept, name).half().float() for name in fields}
    changed |= {name: orthonormal(changed[name]) for name in ("basis_q", "basis_k")}
    return flat.changed(concept, slug="half", **changed)


@pytest.mark.parametrize("kind", ["float16", "other angles", "some heads", "one stream"])
def test_near_copies_and_parts_are_held_as_copies(make_concept, kind):
    concept = turning(make_concept, SWIRL)
    rows = {name: flat.field(concept, name)[:2] for name in ("heads", "basis_q", "basis_k")}
    rows |= {f"generator_{stream}": flat.field(concept, f"generator_{stream}")[:2] for stream in ("text", "image")}
    copy = {
        "float16": halved(concept),
        "other angles": flat.changed(concept, slug="b", generator_text=concept.text.generator * 0.999),
        "some heads": flat.changed(concept, slug="b", **rows),
        "one stream": flat.changed(concept, slug="b", generator_image=concept.image.generator * 0),
    }[kind]
    held = held_strengths([concept, copy], [1.2, 1.2])
    assert sum(held) * SWIRL == pytest.approx(math.pi, rel=1e-3)
    assert len(strength_notes([concept, copy], [1.2, 1.2])) == 2


def test_concepts_of_their_own_and_parts_without_a_common_head_are_not_held(make_concept):
    concept, other = turning(make_concept, SWIRL), turning(make_concept, SWIRL, "other")
    assert held_strengths([concept, other], [1.2, 1.2]) == (1.2, 1.2)
    names = ("heads", "basis_q", "basis_k", "generator_text", "generator_image")
    first, second = (
        flat.changed(concept, **{name: flat.field(concept, name)[rows] for name in names})
        for rows in (slice(2), slice(2, None))
    )
    assert held_strengths([first, second], [1.2, 1.2]) == (1.2, 1.2)
    away = flat.changed(
        concept, slug="away", generator_text=-concept.text.generator, generator_image=-concept.image.generator
    )
    assert held_strengths([concept, away], [1.2, 1.2]) == (1.2, 1.2), "the opposite does not add up"


def relative(make_concept, **fields):
    """A concept whose heads turn fully, by nearly half a turn, at a risk of 0.05."""
    return turning(make_concept, 3.0, **{f"full_{role}": torch.full((6,), 0.05) for role in "qk"}, **fields)


def test_copies_that_turn_fully_at_a_low_risk_are_refused(make_concept, geometry):
    """A lower strength is no help: s saturates at a higher risk, and turns as far."""
    concept = relative(make_concept)
    copy, x = flat.changed(concept, slug="copy"), at_risk(concept, 0.3)
    for strengths in ([1.0, 1.0], [0.5, 0.5], [0.1, -0.9]):
        with pytest.raises(ValueError, match="concepts 'star', 'copy': got copies that together turn past half a turn"):
            Protection([concept, copy], geometry, strengths)
    once, twice = (rotated(Protection([concept], geometry, [0.5]), x) for _ in range(2))
    twice = rotated(Protection([copy], geometry, [0.5]), twice)
    assert (twice - x).norm() < 0.5 * (once - x).norm(), "one after the other they turn back, at half the strength too"
    for strengths in ([1.0, 0.0], [0.02, 0.02]):  # at most 0.4 of a full angle each, at any risk
        assert held_strengths([concept, copy], strengths) == tuple(strengths)
    for strength in (0.5, 1.0, 2.0):
        assert held_strengths([concept], [strength]) == (strength,)
    other = relative(make_concept, slug="zappy")
    assert held_strengths([concept, other], [1.0, 1.0]) == (1.0, 1.0), "control: no copy"
    plain = flat.changed(concept, full_q=None, full_k=None)
    assert held_strengths([plain, flat.changed(plain, slug="copy")], [0.5, 0.5]) == (0.5, 0.5), "control"
