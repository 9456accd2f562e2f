"""What is collected from blocks: the right tokens, whoever sees them, in whatever order."""

from __future__ import annotations

import pytest
import torch

from saferope_core import (
    BENIGN,
    IMAGE,
    PADDING,
    SUBJECT,
    UNSAFE,
    WORDS,
    Gathering,
    Geometry,
    Reservoir,
    schedule,
    token_kinds,
)

GEOMETRY = Geometry(1, 1, 2, 8)
TEXT, IMAGE_TOKENS = 6, 130  # every second image token is looked at: 65


def test_schedule_meets_every_time_in_small_steps():
    times = schedule((1.0, 0.8, 0.5))
    assert times == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert {1.0, 0.8, 0.5} <= set(times), "met exactly"
    assert schedule((0.95,)) == [1.0, 0.95]


def test_reservoir_is_bounded_uniform_and_repeatable():
    stream = torch.arange(3000.0)[:, None]
    kept = []
    for seed, size in ((0, 70), (0, 1000), (1, 70)):
        keys = torch.rand(3000, generator=torch.Generator().manual_seed(seed))
        reservoir = Reservoir(300)
        for chunk, own in zip(stream.split(size), keys.split(size), strict=True):
            reservoir.add(chunk, own)
        kept.append(reservoir.items)
    assert kept[0].shape == (300, 1)
    assert torch.equal(kept[0], kept[1]), "however it came"
    assert not torch.equal(kept[0], kept[2])
    assert len(kept[0].unique()) == 300
    # mean of 300 of 0..2999: 1499.5 +- 50 (one sigma); first-come or last-come would be off by 1350
    assert kept[0].mean() == pytest.approx(1499.5, abs=200)


@pytest.mark.parametrize("sizes", [[70] * 9, [1, 299, 330], [630], [300, 330]])
def test_reservoir_keeps_the_smallest_keys_where_they_are(sizes):
    stream, keys = torch.arange(630.0)[:, None], torch.rand(630)
    reservoir, places = Reservoir(300), set()
    for chunk, own in zip(stream.split(sizes), keys.split(sizes), strict=True):
        reservoir.add(chunk, own)
        if len(reservoir.keys) == 300:
            places.add(reservoir._held.data_ptr())
    smallest = keys.argsort()[:300].sort().values
    assert torch.equal(reservoir.items, stream[smallest]) and torch.equal(reservoir.keys, keys[smallest])
    assert len(places) == 1, "a full sample is not copied"


def test_kinds_part_the_tokens():
    used = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    subject = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    kinds = token_kinds(used, subject)
    assert kinds[WORDS].long().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert kinds[PADDING].long().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], "as many as a prompt has words"


def shown(split: bool):
    """Statistics of two prompts in two blocks: seen together, or one by one."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 2, TEXT + IMAGE_TOKENS, 8)  # block, prompt, ...: the same for both ways
    used = torch.ones(2, TEXT).bool()
    subject = torch.zeros(2, TEXT).bool()
    subject[:, 1] = True
    gathering = Gathering(GEOMETRY, capacity=20)
    for side in (UNSAFE, BENIGN):
        for rows in ([0], [1]) if split else ([0, 1],):
            kinds = token_kinds(used, subject if side == UNSAFE else torch.zeros_like(subject))
            visit = gathering.visit(side, {kind: mask[rows] for kind, mask in kinds.items()}, IMAGE_TOKENS, rows)
            visit.at_time()
            for block, block_type in enumerate(("double", "single")):
                for role in "qk":
                    spans = (0, TEXT), (TEXT, TEXT + IMAGE_TOKENS)
                    visit.listen(x[block, rows], -x[block, rows], role, block_type, 0, *spans)
    return x, gathering.statistics()


def test_statistics_do_not_depend_on_batches():
    (x, together), (_, apart) = shown(False), shown(True)
    for each, vectors in together.vectors.items():
        for role in "qk":
            torch.testing.assert_close(vectors.gram[role], apart.vectors[each].gram[role])
            assert torch.equal(vectors.sample[role], apart.vectors[each].sample[role])
    subject = x[1, :, :, 1].double()  # [prompt, H, D]: the second token, in the single block
    torch.testing.assert_close(
        together.vectors[UNSAFE, SUBJECT].gram["q"][1], torch.einsum("nhd,nhe->hde", subject, subject)
    )
    picture = x[1, :, :, TEXT::2].double()
    torch.testing.assert_close(
        together.vectors[UNSAFE, IMAGE].gram["k"][1], torch.einsum("nhld,nhle->hde", picture, picture)
    )
    assert together.vectors[BENIGN, IMAGE].sample["k"].shape[1] == 20, "bounded"


def test_met_is_of_the_other_role():
    """Keys meet queries: what is shown as q counts for k."""
    gathering = Gathering(GEOMETRY, capacity=0)
    visit = gathering.visit(UNSAFE, token_kinds(torch.ones(1, 1).bool(), torch.zeros(1, 1).bool()), 1, [0])
    visit.at_time()
    x = torch.ones(1, 2, 2, 8)
    visit.listen(x, 3 * x, "q", "single", 0, (0, 1), (1, 2))
    met = gathering.statistics().met
    assert met["k"][1].unique().tolist() == [18.0] and not met["q"].any()  # two tokens of 3 * 3


def test_items_and_keys_that_do_not_fit_are_refused():
    """Padding of a network that came as image tokens had no keys, and shifted those of the next prompt."""
    for count in (15, 17):
        with pytest.raises(ValueError, match=f"got 16 items and {count} keys"):
            Reservoir(300).add(torch.zeros(16, 2), torch.rand(count))
    reservoir = Reservoir(300)
    reservoir.add(torch.zeros(16, 2), torch.rand(16))
    assert len(reservoir.keys) == 16, "control"
