"""Overlap and orthogonalisation: against principal angles known beforehand, and by what they promise, commuting."""

import itertools

import pytest
import torch

from saferope_core import STREAMS, Protection, orthogonalised, overlap, skew, taken_apart
from tests.support import concepts as flat

BLOCKS = [("double", 0), ("double", 1), ("single", 1)]  # in which the example concepts have heads


def spans(*columns):
    """A basis [6, 32, n] of unit vectors, the same in every head."""
    return torch.eye(32)[:, list(columns)].repeat(6, 1, 1)


@pytest.mark.parametrize(("columns", "shared"), [((5, 6), 0.0), ((0, 5), 0.5), ((1, 0), 1.0)])
def test_overlap_is_the_mean_squared_cosine(make_concept, columns, shared):
    first = make_concept(rank=2, basis_k=spans(0, 1))
    found = overlap(first, make_concept("zappy", rank=2, basis_k=spans(*columns)))
    assert found.shared["text", "k"].tolist() == pytest.approx([shared] * 6, abs=1e-6)
    assert torch.equal(found.heads, first.heads)


def test_only_what_both_turn_counts(make_concept):
    first = make_concept(rank=2, basis_k=spans(0, 1), acts_on="k")
    other = make_concept("zappy", rank=2, heads=[(0, 0, 0)])
    found = overlap(first, other)
    assert set(found.shared) == {("text", "k"), ("image", "k")}
    assert len(found.heads) == len(found.shared["text", "k"]) == len(found.shared["image", "k"]) == 1
    alone = flat.changed(other, heads=torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert overlap(first, alone).most == 0.0 and not len(overlap(first, alone).heads)


def images(rank=4):
    """Bases of their own for image tokens."""
    bases = torch.linalg.qr(torch.randn(2, 6, 32, rank)).Q
    return {"basis_image_q": bases[0], "basis_image_k": bases[1], "generator_image": skew(torch.randn(6, rank, rank))}


def still(rank):
    return torch.zeros(6, rank, rank)


# Spaces of image tokens, and which tokens turn: (earlier, later)
KINDS = {
    "both share": (lambda: {}, lambda: {}),
    "the earlier has its own": (images, lambda: {}),
    "the later has its own": (lambda: {}, images),
    "both have their own": (images, images),
    "the later turns one role of text": (images, lambda: {"acts_on": "k", "acts_on_image": "qk"}),
    "the later turns one role of image": (images, lambda: {"acts_on_image": "q"}),
    "the earlier turns no text": (lambda: {"generator_text": still(5)}, lambda: {}),
    "the later turns no text": (images, lambda: {"generator_text": still(4)}),
    "the later turns no image": (images, lambda: {"generator_image": still(4)}),
    "gates": (images, lambda: {"gate_q": torch.full((6,), 0.01), "gate_k": torch.full((6,), 0.02)}),
}


def apart(geometry, first, second):
    """How far the two orders of two concepts are from each other, for [text, image] tokens of [q, k] in all blocks."""
    random = torch.Generator().manual_seed(5)
    result = torch.zeros(2, 2)
    for kind, index in BLOCKS:
        for number, role in enumerate("qk"):
            x = torch.randn(2, 3, 9, 32, generator=random)
            one, other = (
                Protection(concepts, geometry).rotate(x, role, kind, index, (0, 4), (4, 9))
                for concepts in ((first, second), (second, first))
            )
            far = (one - other).abs()
            here = torch.stack([far[:, :, :4].amax(), far[:, :, 4:].amax()])
            result[:, number] = torch.maximum(result[:, number], here)
    return result


def meet(first, second):
    """bool [text, image] x [q, k]: both turn such vectors."""
    turns = [
        [
            [bool(flat.field(each, f"generator_{stream}").any()) and role in each.acts(stream) for role in "qk"]
            for stream in STREAMS
        ]
        for each in (first, second)
    ]
    return torch.tensor(turns[0]) & torch.tensor(turns[1])


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonalised_concepts_commute_in_both_streams_and_roles(make_concept, geometry, kind):
    earlier, later = KINDS[kind]
    first = make_concept(threshold=0.0, **earlier())
    second = make_concept("zappy", rank=4, reach=1, threshold=0.0, **later())
    free = orthogonalised(second, first)
    assert overlap(first, free).most < 1e-10
    assert apart(geometry, first, free).max() < 2e-5
    control = apart(geometry, first, second)
    assert torch.equal(control > 1e-2, meet(first, second)), "negative control: they do not as they are"
    for role in "qk":
        assert torch.equal(free.gate(role, "image"), second.gate(role, "image"))


def test_text_bases_alone_do_not_make_image_tokens_commute(make_concept, geometry):
    """What was done before: a later concept's one basis, free of the earlier one's text basis,
    turns image tokens too."""
    first = make_concept(threshold=0.0, **images())
    second = make_concept("zappy", rank=4, threshold=0.0)
    free = orthogonalised(second, first)
    shared = flat.changed(free, basis_image_q=None, basis_image_k=None)
    assert overlap(first, shared).of("text") < 1e-10 < 1e-2 < overlap(first, shared).of("image")
    text, image = apart(geometry, first, shared).amax(1)
    assert text < 2e-5 and image > 1e-2
    assert free.image.basis is not None and apart(geometry, first, free).max() < 2e-5


def test_bases_stay_one_where_image_tokens_meet_no_other_spaces(make_concept):
    first, second = make_concept(), make_concept("zappy", rank=4)
    assert orthogonalised(second, first).image.basis is None
    quiet = flat.changed(second, generator_image=still(4))
    assert orthogonalised(quiet, make_concept(**images())).image.basis is None
    assert orthogonalised(second, make_concept(**images())).image.basis is not None, "control"


@pytest.mark.parametrize("own", ["both", "one"])
def test_overlap_sees_the_spaces_of_image_tokens(make_concept, own):
    """The same space for image tokens, orthogonal ones for text."""
    image = {"basis_image_q": spans(7, 8), "basis_image_k": spans(7, 8)}
    first = make_concept(rank=2, basis_q=spans(0, 1), basis_k=spans(0, 1), **image)
    text = spans(2, 3) if own == "both" else spans(7, 8)
    second = make_concept("zappy", rank=2, basis_q=text, basis_k=text, **(image if own == "both" else {}))
    found = overlap(first, second)
    assert (found.of("text"), found.of("image"), found.most) == (0, pytest.approx(1), pytest.approx(1))
    quiet = flat.changed(second, generator_image=still(2))
    assert overlap(first, quiet).most == 0 and set(overlap(first, quiet).shared) == {("text", "q"), ("text", "k")}
    with pytest.raises(ValueError, match="almost wholly in the space of 'star' for image tokens"):
        orthogonalised(second, first)
    assert torch.equal(orthogonalised(quiet, first).text.basis.k, quiet.text.basis.k)


@pytest.mark.parametrize("idle", [{"strength": 0.0}, {"generator_text": still(4), "generator_image": still(4)}])
def test_who_turns_nothing_takes_nothing(make_concept, idle):
    """Else the shared part would be left to a concept that does not suppress it."""
    first, second = make_concept(rank=4), make_concept("zappy", rank=4)
    taken = flat.changed(first, **idle)
    assert (
        torch.equal(orthogonalised(second, taken).text.basis.k, second.text.basis.k)
        and overlap(taken, second).most == 0
    )
    assert not torch.equal(orthogonalised(second, first).text.basis.k, second.text.basis.k), "control"


def test_many_are_taken_apart_one_from_all_before(make_concept):
    """Every basis is the nearest orthonormal one to what is left of it outside of those before it."""
    some = [(0, 0, 2), (1, 1, 0), (1, 1, 2)]
    concepts = [make_concept(rank=4), make_concept("b", rank=3, heads=some), make_concept("c", rank=5)]
    told = []
    free = taken_apart(concepts, lambda: told.append(1))
    assert len(told) == 3 and torch.equal(free[0].text.basis.q, concepts[0].text.basis.q)
    for first, second in itertools.combinations(range(3), 2):
        assert overlap(free[first], free[second]).most < 1e-10
        assert overlap(concepts[first], concepts[second]).most > 1e-2, "control: they overlap as they are"
    places = concepts[2].heads.tolist()
    for row, place in enumerate(places):
        before = [
            each.text.basis.k[each.heads.tolist().index(place)] for each in free[:2] if place in each.heads.tolist()
        ]
        spaces, basis = torch.cat(before, dim=1).double(), concepts[2].text.basis.k[row].double()
        left, _, right = torch.linalg.svd(basis - spaces @ (spaces.mT @ basis), full_matrices=False)
        torch.testing.assert_close(free[2].text.basis.k[row].double(), left @ right, rtol=0, atol=1e-6)


def test_heads_that_are_not_shared_stay(make_concept):
    first = make_concept(heads=[(0, 0, 1)])
    second = make_concept("zappy")
    free = orthogonalised(second, first)
    same = [torch.equal(a, b) for a, b in zip(free.text.basis.k, second.text.basis.k, strict=True)]
    assert same.count(False) == sum(place == [0, 0, 1] for place in second.heads.tolist())


def test_what_lies_within_the_other_cannot_be_taken_out(make_concept):
    first = make_concept(rank=3, basis_q=spans(0, 1, 2), basis_k=spans(0, 1, 2))
    second = make_concept("zappy", rank=2, basis_q=spans(1, 9), basis_k=spans(1, 9))
    with pytest.raises(ValueError, match="'zappy': a direction of it lies almost wholly in the space of 'star'"):
        orthogonalised(second, first)
