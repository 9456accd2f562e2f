"""Head selection on vectors whose structure is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saferope_core import (
    BENIGN,
    COLLECTED,
    IMAGE,
    PADDING,
    SUBJECT,
    UNSAFE,
    WORDS,
    Concept,
    Geometry,
    GramSum,
    Ranks,
    Statistics,
    Vectors,
    critical_heads,
    fixed_generators,
    latent_risk_score,
    random_generators,
    read_heads,
)

GEOMETRY = Geometry(1, 2, 2, 16)
TELLING = [(0, 1), (2, 0)]  # (row, head) whose unsafe vectors lie in a subspace of their own


def side(telling: bool, seed: int) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    sample = {role: torch.randn(3, 400, 2, 16, generator=generator) for role in "qk"}
    if telling:
        for role in "qk":
            for row, head in TELLING:
                sample[role][row, :, head, 3:] *= 0.02  # nearly all energy in the first three dimensions
    grams = {}
    for role in "qk":
        sums = [GramSum(2, 16) for _ in range(3)]
        for total, vectors in zip(sums, sample[role], strict=True):
            total.add(vectors)
        grams[role] = torch.stack([total.gram for total in sums])
    return Vectors(grams, {role: vectors.bfloat16() for role, vectors in sample.items()})


@pytest.fixture(scope="module")
def statistics():
    return of(side(True, 1), side(False, 2))


def of(unsafe: Vectors, benign: Vectors, met: torch.Tensor | None = None) -> Statistics:
    """The subject tells, nothing else does."""
    kinds = {each: benign for each in COLLECTED} | {(UNSAFE, SUBJECT): unsafe}
    met = torch.eye(16, dtype=torch.float64).expand(3, 2, 16, 16) if met is None else met
    return Statistics(kinds, {role: met for role in "qk"})


def read(statistics, **changes):
    chosen = dict(ranks=Ranks(3), basis="svd", threshold=0.7, cut=0.5, gate="calibrated", quantile=0.99) | changes
    return read_heads(statistics, **chosen)


@pytest.mark.parametrize("basis", ["svd", "contrastive"])
def test_only_heads_that_tell_are_critical(statistics, basis):
    table = read(statistics, basis=basis)
    assert table.critical.nonzero().tolist() == [list(place) for place in TELLING]
    assert table.discrimination[0, 1] > 0.9 > 0.2 > table.discrimination[1].max()
    for role in "qk":
        inside = table.basis[role][0, 1][:3].norm()  # the first three rows hold the whole basis
        assert inside == pytest.approx(3**0.5, rel=1e-2)


def test_critical_heads_are_sorted_places(statistics):
    chosen = critical_heads(read(statistics), GEOMETRY)
    assert chosen.heads.tolist() == [[0, 0, 1], [1, 1, 0]] and chosen.heads.dtype == torch.int32
    assert chosen.basis["q"].shape == (2, 16, 3) and chosen.gate["k"].shape == (2,)
    assert torch.equal(chosen.basis["k"][1], read(statistics).basis["k"][2, 0])


def test_calibrated_gates_let_the_quantile_pass(statistics):
    table = read(statistics, quantile=0.95)
    benign, basis = statistics.vectors[BENIGN, WORDS].sample["q"][0, :, 1], table.basis["q"][0, 1]
    risk = (benign.float() @ basis).square().sum(-1) / benign.float().square().sum(-1)
    passing = (risk > table.gate["q"][0, 1] + 1e-6).sum()  # the gate itself is one of these risks: rounding may lift it
    assert passing == 20, "5 % of 400: words and padding are the same here"


def test_fixed_gates_are_the_threshold(statistics):
    assert (read(statistics, gate="fixed", threshold=0.6).gate["k"] == 0.6).all()


def halves(first: float) -> Vectors:
    """Vectors whose first three dimensions hold the share `first` of their length squared, their signs at random."""
    sizes = torch.tensor([first / 3] * 3 + [(1 - first) / 13] * 13).sqrt()
    generator = torch.Generator().manual_seed(round(100 * first))
    sample = {role: sizes * torch.randint(0, 2, (3, 400, 2, 16), generator=generator).mul(2).sub(1) for role in "qk"}
    grams = {role: torch.einsum("bnhd,bnhe->bhde", x.double(), x.double()) for role, x in sample.items()}
    return Vectors(grams, {role: x.bfloat16() for role, x in sample.items()})


def test_delta_counts_above_each_heads_own_gate_not_above_the_papers():
    """Risks of about 0.5 against 0.2: told apart at the head's own gate, where equation 4 with its 0.7 sees nothing."""
    given = of(halves(0.5), halves(0.2))
    ours, paper = read(given, quantile=0.998), read(given, gate="fixed")
    for role in "qk":
        assert ours.gate[role].max() < 0.45 and (ours.risk[role][UNSAFE] - 0.5).abs().max() < 0.1
    assert ours.discrimination.min() > 0.99 and ours.critical.all()
    assert not paper.discrimination.any() and not paper.critical.any()
    for other in (0.1, 0.9):
        assert torch.equal(read(given, quantile=0.998, threshold=other).discrimination, ours.discrimination)
    lower = read(given, gate="fixed", threshold=0.35)
    assert lower.discrimination.min() > 0.99, "control: a fixed gate between the two tells them apart too"


def test_no_critical_head_is_an_error_that_says_so(statistics):
    benign = statistics.vectors[BENIGN, WORDS]
    with pytest.raises(
        ValueError, match=r"no head .* tells the concept apart; heads by Δ: 0 to 0.1: 6 \(largest 0.00\)"
    ):
        critical_heads(read(of(benign, benign)), GEOMETRY)


def test_padding_and_words_add_what_sets_them_apart(statistics):
    """Energy that unsafe padding alone has in dimension 9, and unsafe words in dimension 11."""
    kinds = dict(statistics.vectors)
    for kind, dimension in ((PADDING, 9), (WORDS, 11)):
        grams = {role: gram.clone() for role, gram in kinds[UNSAFE, kind].gram.items()}
        for gram in grams.values():
            gram[..., dimension, dimension] += 500
        kinds[UNSAFE, kind] = Vectors(grams, kinds[UNSAFE, kind].sample)
    ranks = Ranks(3, padding=1, words=1)
    table = read(Statistics(kinds, statistics.met), ranks=ranks)
    assert table.basis["k"].shape[-1] == ranks.risk == 5
    for column, dimension in ((3, 9), (4, 11)):
        assert table.basis["k"][0, 1, dimension, column].abs() > 0.95
    torch.testing.assert_close(table.basis["q"].mT @ table.basis["q"], torch.eye(5).expand(3, 2, 5, 5))


def test_reach_is_what_is_met_most_outside_the_subspace(statistics):
    met = torch.eye(16, dtype=torch.float64).repeat(3, 2, 1, 1)
    met[..., 12, 12], met[..., 1, 1] = 9.0, 99.0  # dimension 1 is inside the telling heads' subspaces
    table = read(
        of(statistics.vectors[UNSAFE, SUBJECT], statistics.vectors[BENIGN, WORDS], met), ranks=Ranks(3, reach=2)
    )
    assert table.reach == 2 and table.basis["q"].shape[-1] == 5
    assert table.basis["q"][0, 1, 12, 3].abs() > 0.95
    without = read(statistics)
    for role in "qk":
        assert torch.equal(table.gate[role], without.gate[role]), "risk knows nothing of the reach"


def test_relative_dimensions_tell_and_the_others_only_turn(statistics):
    """Energy in dimension 14: little of it, but of the subject alone; the subject's most energy lies in 1 to 3."""
    kinds, ranks = dict(statistics.vectors), Ranks(2, 1, 0, 3, 3, relative=1)
    for side, kind in ((UNSAFE, SUBJECT), (UNSAFE, IMAGE)):
        own = kinds[side, kind]
        sample = {role: each.clone() for role, each in own.sample.items()}
        grams = {role: gram.clone() for role, gram in own.gram.items()}
        for role in "qk":
            sample[role][0, :, 1, 14] = sample[role][0, :, 1].float().norm(dim=-1) * 0.4
            grams[role][0, 1] = sample[role][0, :, 1].double().T @ sample[role][0, :, 1].double()
        kinds[side, kind] = Vectors(grams, sample)
    for name in (BENIGN, WORDS), (BENIGN, PADDING), (BENIGN, IMAGE), (UNSAFE, PADDING), (UNSAFE, WORDS):
        own = kinds[name]
        sample = {role: each.clone() for role, each in own.sample.items()}
        grams = {role: gram.clone() for role, gram in own.gram.items()}
        for role in "qk":
            sample[role][0, :, 1, 14] *= 0.1
            grams[role][0, 1, 14], grams[role][0, 1, :, 14] = 0, 0
            grams[role][0, 1, 14, 14] = sample[role][0, :, 1, 14].double().square().sum()
        kinds[name] = Vectors(grams, sample)
    table = read(Statistics(kinds, statistics.met), ranks=ranks)
    assert (ranks.risk, ranks.image_risk, ranks.outside) == (1, 1, 6) == (1, 1, table.reach)
    for name in ("q", "k", "image_q", "image_k"):
        basis = table.basis[name]
        assert basis.shape[-1] == 7 and basis[0, 1, 14, 0].abs() > 0.9, name
        torch.testing.assert_close(basis.mT @ basis, torch.eye(7).expand(3, 2, 7, 7))
    for name in ("image_q", "image_k"):
        torch.testing.assert_close(table.full[name], (2 * table.gate[name]).clamp(1e-4, 1))
    for role in "qk":  # 0.16 of 1.16 of the energy, in every vector of the subject
        assert table.full[role][0, 1] == pytest.approx(0.16 / 1.16, rel=0.05) and table.gate[role][0, 1] < 0.05
    assert table.critical[0, 1] and table.basis["k"][0, 1, :3, 1:3].norm() > 1, "the subject's own turn behind"
    assert read(statistics, ranks=Ranks(3)).full == {}, "control"
    narrow = read(Statistics(kinds, statistics.met), ranks=Ranks(2, 1, 0, 3, 1, relative=1))
    assert narrow.basis["image_k"].shape[-1] == 7, "what image tokens are met by fills up"
    with pytest.raises(ValueError, match="image is 7, expected at most 6"):
        Ranks(2, 1, 0, 3, 7, relative=1)


def test_fields_are_a_concepts(statistics):
    """All that a Concept needs of its heads, image bases only where they were asked for."""
    for image in (0, 2):
        chosen = critical_heads(read(statistics, ranks=Ranks(3, reach=1, image=image)), GEOMETRY)
        generators = fixed_generators(chosen, 2.0)
        assert (
            [generator.shape[-1] for generator in generators] == list(chosen.widths) == [4, 1 + image if image else 4]
        )
        assert generators[0].any(dim=(1, 2)).all() and not generators[1][0].any(), "image tokens rest in double blocks"
        concept = Concept(
            slug="a",
            name="A",
            description="",
            geometry=GEOMETRY,
            discrimination=torch.zeros(3, 2),
            **chosen.fields(generators, "qk"),
        )
        assert (concept.image.basis is not None) == (concept.image.gate.k is not None) == bool(image)
        assert (concept.rank, concept.reach) == (3, 1)


def test_image_tokens_turn_in_every_block_of_a_model_without_single_ones(statistics):
    doubles = replace(GEOMETRY, double_blocks=GEOMETRY.blocks, single_blocks=0)
    for geometry, rests in ((doubles, False), (GEOMETRY, True)):
        chosen = critical_heads(read(statistics), geometry)
        for text, image in (fixed_generators(chosen, 2.0), random_generators(chosen, 0, 1.0, 0.3)):
            assert text.any(dim=(1, 2)).all() and image.any(dim=(1, 2)).all() != rests


def test_random_generators_repeat(statistics):
    chosen = critical_heads(read(statistics), GEOMETRY)
    first, again, other = (random_generators(chosen, seed, 1.0, 0.3)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_relative_dimensions_of_the_padding_tell_a_template_s_end(statistics):
    """Energy in dimension 9 of the padding behind unsafe prompts alone: the subject knows nothing of it."""
    kinds = dict(statistics.vectors)
    own = kinds[UNSAFE, PADDING]
    grams = {role: gram.clone() for role, gram in own.gram.items()}
    for role in "qk":
        grams[role][0, 1, 9, 9] *= 40
    kinds[UNSAFE, PADDING] = Vectors(grams, own.sample)
    marked, plain = Statistics(kinds, statistics.met), statistics
    ranks = Ranks(2, 1, 0, 3, 3, relative=1, relative_padding=1)
    assert (ranks.risk, ranks.image_risk, ranks.outside) == (2, 1, 6)
    end = torch.nn.functional.one_hot(torch.tensor(9), 16).float()
    for role in "qk":
        told = {
            name: latent_risk_score(end[None, None, None], read(seen, ranks=how).basis[role][0, 1:2, :, : how.risk])
            for name, seen, how in (
                ("ours", marked, ranks),
                ("without", marked, replace(ranks, relative_padding=0)),
                ("unmarked", plain, ranks),
            )
        }
        assert told["ours"] > 0.8 > 0.5 > max(told["without"], told["unmarked"]), told
        basis = read(marked, ranks=ranks).basis
        for name, width in ((role, 8), (f"image_{role}", 7)):
            assert basis[name].shape[-1] == width
            torch.testing.assert_close(basis[name].mT @ basis[name], torch.eye(width).expand(3, 2, width, width))
