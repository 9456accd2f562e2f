"""Overlap and orthogonalisation: against principal angles known beforehand, and by what they promise, commuting."""

import pytest
import torch

from saferope_core import overlap
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


def still(rank):
    return torch.zeros(6, rank, rank)


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


@pytest.mark.parametrize("idle", [{"strength": 0.0}, {"generator_text": still(4), "generator_image": still(4)}])
def test_who_turns_nothing_shares_nothing(make_concept, idle):
    first, second = make_concept(rank=4), make_concept("zappy", rank=4)
    assert overlap(flat.changed(first, **idle), second).most == 0
    assert overlap(first, second).most > 1e-2, "control"
