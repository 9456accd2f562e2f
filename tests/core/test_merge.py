"""Overlap and orthogonalisation: against principal angles known beforehand, and by what they promise, commuting."""

import dataclasses
import itertools

import pytest
import torch

from saferope_core import Protection, orthogonalised, overlap, taken_apart

SINGLE = ("single", 1)


def spans(*columns):
    """A basis [6, 32, n] of unit vectors, the same in every head."""
    return torch.eye(32)[:, list(columns)].repeat(6, 1, 1)


@pytest.mark.parametrize(("columns", "shared"), [((5, 6), 0.0), ((0, 5), 0.5), ((1, 0), 1.0)])
def test_overlap_is_the_mean_squared_cosine(make_concept, columns, shared):
    first = make_concept(rank=2, basis_k=spans(0, 1))
    found = overlap(first, make_concept("zappy", rank=2, basis_k=spans(*columns)))
    assert found.shared["k"].tolist() == pytest.approx([shared] * 6, abs=1e-6)
    assert torch.equal(found.heads, first.heads)


def test_only_what_both_turn_counts(make_concept):
    first = make_concept(rank=2, basis_k=spans(0, 1), acts_on="k")
    other = make_concept("zappy", rank=2, heads=[(0, 0, 0)])
    found = overlap(first, other)
    assert set(found.shared) == {"k"} and len(found.heads) == len(found.shared["k"]) == 1
    alone = dataclasses.replace(other, heads=torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert overlap(first, alone).mean == 0.0 and not len(overlap(first, alone).heads)


@pytest.mark.parametrize("role", ["q", "k"])
def test_orthogonalised_concepts_commute(make_concept, geometry, role):
    first, second = make_concept(threshold=0.0), make_concept("zappy", rank=4, reach=1, threshold=0.0)
    free = orthogonalised(second, first)
    assert overlap(first, free).mean < 1e-10 < overlap(first, second).mean
    x = torch.randn(2, 3, 9, 32)

    def both(*concepts):
        return Protection(concepts, geometry).rotate(x, role, *SINGLE, (0, 4), (4, 9))

    torch.testing.assert_close(both(first, free), both(free, first), rtol=0, atol=2e-5)
    assert (both(first, second) - both(second, first)).abs().max() > 1e-2, "negative control"


def test_many_are_taken_apart_one_from_all_before(make_concept):
    """Every basis is the nearest orthonormal one to what is left of it outside of those before it."""
    some = [(0, 0, 2), (1, 1, 0), (1, 1, 2)]
    concepts = [make_concept(rank=4), make_concept("b", rank=3, heads=some), make_concept("c", rank=5)]
    told = []
    free = taken_apart(concepts, lambda: told.append(1))
    assert len(told) == 3 and torch.equal(free[0].basis_q, concepts[0].basis_q)
    for first, second in itertools.combinations(range(3), 2):
        assert overlap(free[first], free[second]).mean < 1e-10
        assert overlap(concepts[first], concepts[second]).mean > 1e-2, "control: they overlap as they are"
    places = concepts[2].heads.tolist()
    for row, place in enumerate(places):
        before = [each.basis_k[each.heads.tolist().index(place)] for each in free[:2] if place in each.heads.tolist()]
        spaces, basis = torch.cat(before, dim=1).double(), concepts[2].basis_k[row].double()
        left, _, right = torch.linalg.svd(basis - spaces @ (spaces.mT @ basis), full_matrices=False)
        torch.testing.assert_close(free[2].basis_k[row].double(), left @ right, rtol=0, atol=1e-6)


def test_heads_that_are_not_shared_stay(make_concept):
    first = make_concept(heads=[(0, 0, 1)])
    second = make_concept("zappy")
    free = orthogonalised(second, first)
    same = [torch.equal(a, b) for a, b in zip(free.basis_k, second.basis_k, strict=True)]
    assert same.count(False) == sum(place == [0, 0, 1] for place in second.heads.tolist())


def test_what_lies_within_the_other_cannot_be_taken_out(make_concept):
    first = make_concept(rank=3, basis_q=spans(0, 1, 2), basis_k=spans(0, 1, 2))
    second = make_concept("zappy", rank=2, basis_q=spans(1, 9), basis_k=spans(1, 9))
    with pytest.raises(ValueError, match="'zappy': a direction of it lies almost wholly in the space of 'star'"):
        orthogonalised(second, first)
