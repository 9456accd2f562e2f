"""Grouped keys: several query heads share a key head. Queries turn by their own rows, keys by the first of a group."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from saferope_core import (
    BENIGN,
    SINGLE,
    SUBJECT,
    UNSAFE,
    Forward,
    Gathering,
    Geometry,
    Protection,
    Ranks,
    load_concepts,
    overlap,
    read_heads,
    save_concepts,
    token_kinds,
)
from tests.support import concepts as flat

GROUPED = Geometry(double_blocks=0, single_blocks=2, heads=6, head_dim=32, family="krea2", key_heads=2)
# key head 0 of block 0 is shared by heads 1 and 2, which both turn; key head 1 of block 1 by head 4 alone
ROWS = [(SINGLE, 0, 1), (SINGLE, 0, 2), (SINGLE, 1, 4)]
OWNERS = [0, 2]  # the rows that turn a key head
KEYS = [(SINGLE, 0, 0), (SINGLE, 1, 1)]  # those key heads
SPANS = {"text": (0, 3), "image": (3, 7)}


def keys_alone(concept, make_concept):
    """The concept of the key heads, on a geometry that has no others."""
    rows = {name: flat.field(concept, name)[OWNERS] for name in ("basis_k", "generator_text", "generator_image")}
    alone = Geometry(0, 2, 2, 32, "krea2")
    return make_concept(heads=tuple(KEYS), geometry=alone, **rows, basis_q=rows["basis_k"], threshold=concept.threshold)


@pytest.mark.parametrize("block", [0, 1])
def test_both_roles_turn_by_their_own_heads(make_concept, naive_protection, block):
    concept = make_concept(heads=tuple(ROWS), geometry=GROUPED)
    protection = Protection([concept], GROUPED)
    q, k = torch.randn(2, 6, 7, 32), torch.randn(2, 2, 7, 32)
    for role, x, expected in (("q", q, concept), ("k", k, keys_alone(concept, make_concept))):
        turned = protection.rotate(x, role, "single", block, **SPANS)
        naive = naive_protection([expected], x, role, (SINGLE, block), **SPANS)
        torch.testing.assert_close(turned.double(), naive, atol=2e-5, rtol=0)
        assert not torch.equal(turned, x)


@pytest.mark.parametrize(("row", "moves"), [(0, True), (1, False)])
def test_the_first_row_of_a_group_turns_its_key_head(make_concept, row, moves):
    """Control: other tensors in the second row change nothing for keys, and do for queries."""
    concept = make_concept(heads=tuple(ROWS), geometry=GROUPED, threshold=0.0)
    generator = concept.text.generator.clone()
    generator[row] *= -1
    other = replace(concept, text=replace(concept.text, generator=generator))
    for role, heads, differs in (("k", 2, moves), ("q", 6, True)):
        x = torch.randn(1, heads, 7, 32)
        one, two = (Protection([each], GROUPED).rotate(x, role, "single", 0, **SPANS) for each in (concept, other))
        assert torch.equal(one, two) != differs


def test_a_key_head_is_told_as_the_first_that_shares_it(make_concept):
    concept = make_concept(heads=tuple(ROWS), geometry=GROUPED, threshold=0.0)
    forward = Forward(["one"], 1.0, (2, 2))
    for role, heads in (("q", 6), ("k", 2)):
        Protection([concept], GROUPED).rotate(torch.randn(1, heads, 7, 32), role, "single", 1, **SPANS, seen=forward)
    assert [heads.tolist() for _, heads, _ in forward.tallies[0, "text"].heads] == [[4], [3]]


def test_files_tell_key_heads_where_they_differ(make_concept, path):
    concept = make_concept(heads=tuple(ROWS), geometry=GROUPED)
    save_concepts(path, [concept])
    assert load_concepts(path)[0].geometry == GROUPED
    assert _geometry(path)["key_heads"] == 2
    save_concepts(path, [make_concept()])
    assert "key_heads" not in _geometry(path), "every earlier reader of version 1 takes this file"


def _geometry(path):
    data = path.read_bytes()
    return json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["geometry"])


@pytest.mark.parametrize("keys", [4, 0, 12, "2"])
def test_key_heads_have_to_divide_the_heads(keys):
    with pytest.raises(ValueError, match=r"key_heads|key heads"):
        Geometry(0, 2, 6, 32, key_heads=keys)


def test_a_concept_of_other_key_heads_is_refused(make_concept):
    concept = make_concept(heads=tuple(ROWS), geometry=GROUPED)
    with pytest.raises(
        ValueError, match=r"6 heads \(2 of keys\) x 32, but the model is krea2: .* 6 heads \(3 of keys\)"
    ):
        Protection([concept], replace(GROUPED, key_heads=3))


def test_concepts_that_share_a_key_head_overlap_there(make_concept):
    """They turn no query head in common."""
    first, second = (make_concept(slug, 4, (row,), GROUPED) for slug, row in (("one", ROWS[0]), ("two", ROWS[1])))
    assert set(overlap(first, second).shared) == {("text", "k"), ("image", "k")}
    assert overlap(first, second).most > 1e-2


def test_heads_are_read_with_keys_of_their_own_number():
    gathering = Gathering(GROUPED, 64)
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for side in (UNSAFE, BENIGN):
        used = torch.ones(1, 3, dtype=torch.bool)
        subject = torch.tensor([[side == UNSAFE, False, False]])
        visit = gathering.visit(side, token_kinds(used, subject), 4, [1])
        visit.at_time()
        for block in range(2):
            for role, heads in (("q", 6), ("k", 2)):
                x = torch.randn(1, heads, 7, 32, generator=generator)
                seen[side, role, block] = x
                visit.listen(x, 2 * x, role, "single", block, **SPANS)
    statistics = gathering.statistics()
    queries = [seen[side, "q", 0][0, 3:] for side in (UNSAFE, BENIGN)]  # heads 3 to 5 share key head 1
    vectors = 2 * torch.cat([each.flatten(0, 1) for each in queries]).double()
    torch.testing.assert_close(statistics.met["k"][0, 1], vectors.T @ vectors)
    assert statistics.vectors[UNSAFE, SUBJECT].gram["k"].shape == (2, 2, 32, 32)
    table = read_heads(statistics, Ranks(1, reach=1), "svd", 0.7, 0.5, "calibrated", 0.99)
    for tensor in (table.basis["k"], table.gate["k"], table.singular_values):
        assert torch.equal(tensor[:, 0], tensor[:, 2]) and not torch.equal(tensor[:, 2], tensor[:, 3])
    assert table.basis["k"].shape == table.basis["q"].shape == (2, 6, 32, 2)
    assert not torch.equal(table.basis["q"][:, 0], table.basis["q"][:, 2])
