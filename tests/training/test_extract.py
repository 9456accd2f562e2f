"""Extraction: the right tokens, the right times, and Gram matrices that stand for the stacked vectors."""

from __future__ import annotations

import pytest
import torch

from saferope_core import unsafe_basis
from training import extract
from training.attach import listening
from training.models import Text, encode, noise, token_mask, velocity
from training.prompts import BENIGN, UNSAFE, side

TIMES = (1.0, 0.8, 0.5)


def words_of(model, text, mask):
    ids = model.pipe.tokenizer_2(text, padding="max_length", max_length=model.text_length).input_ids
    return model.pipe.tokenizer_2.convert_ids_to_tokens([token for token, used in zip(ids, mask, strict=True) if used])


def test_token_mask_marks_the_subject(model, records):
    unsafe = side(records, UNSAFE)
    masks = token_mask(model, [r.text for r in unsafe], [r.subject for r in unsafe])
    for record, mask in zip(unsafe, masks, strict=True):
        assert words_of(model, record.text, mask) == ["star"]


def test_token_mask_of_a_whole_prompt_has_every_word_and_as_many_pads(model):
    (mask,) = token_mask(model, ["a red star , center"], [None])
    words = ["a", "red", "star", ",", "center", "</s>"]
    assert words_of(model, "a red star , center", mask) == words + ["<pad>"] * len(words)


def test_token_mask_of_a_long_prompt_ends_with_the_text(model):
    (mask,) = token_mask(model, ["red " * 20], [None])
    assert mask.all() and len(mask) == model.text_length


def test_token_mask_refuses_a_span_that_was_cut_off(model):
    long = "red " * 40 + "star"
    with pytest.raises(ValueError, match="no token within the first 24"):
        token_mask(model, [long], [(160, 164)])


def test_schedule_meets_every_time_in_small_steps():
    times = extract.schedule((1.0, 0.8, 0.5))
    assert times == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert {1.0, 0.8, 0.5} <= set(times), "met exactly"
    assert extract.schedule((0.95,)) == [1.0, 0.95]


def test_walk_is_eulers_method_along_the_models_velocity(model):
    text = encode(model, ["a red star , center"])
    start = noise(model, 1, torch.Generator().manual_seed(0))
    seen, expected = [], []

    def listen(x, role, block_type, index, *spans, into=seen):
        if (role, block_type, index) == ("q", "single", 1):
            into.append(x.clone())

    extract.walk(model, text, start, (1.0, 0.9, 0.8), listen)
    x = start
    with torch.no_grad():
        for t in (1.0, 0.9, 0.8):
            with listening(model.transformer, lambda *call: listen(*call, into=expected)):
                v = velocity(model, x, torch.tensor([t]), text)
            x = x - 0.1 * v
    assert len(seen) == 3
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    assert not torch.allclose(seen[0], seen[2], atol=2e-2), "negative control: the times differ"


def stacked(model, records, name):
    """Independent of Collector: every marked token's vectors of one single block, from full batches."""
    chosen = side(records, name)
    texts = [r.text for r in chosen]
    mask = token_mask(model, texts, [r.subject for r in chosen])
    found = []

    def listen(x, role, block_type, index, text, image):
        if (role, block_type, index) == ("k", "single", 1):
            found.append(torch.stack([x[b, :, t] for b, t in mask.nonzero().tolist()]))

    start = noise(model, len(chosen), torch.Generator().manual_seed(0))
    extract.walk(model, encode(model, texts), start, TIMES, listen)
    return torch.cat(found)  # [n, H, D]


@pytest.fixture
def statistics(model, records):
    return extract.extract(model, records, TIMES, capacity=10_000, seed=0)


def test_basis_from_grams_is_the_svd_of_the_stacked_vectors(model, records, statistics):
    vectors = stacked(model, records, UNSAFE)
    assert len(vectors) == 12 * 3
    basis, values = unsafe_basis(statistics[UNSAFE].gram["k"][model.geometry.row("single", 1)], rank=3)
    for head in range(2):
        left, singular, _ = torch.linalg.svd(vectors[:, head].double().T, full_matrices=False)
        torch.testing.assert_close(values[head], singular[:3], rtol=1e-6, atol=1e-6)
        overlap = torch.linalg.svdvals(left[:, :3].T @ basis[head])
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-9)
    other, _ = unsafe_basis(statistics[BENIGN].gram["k"][model.geometry.row("single", 1)], rank=3)
    assert torch.linalg.svdvals(left[:, :3].T @ other[1]).min() < 0.999, "negative control: benign tokens span another"


def test_sample_holds_the_vectors_that_were_seen(model, records, statistics):
    sample = statistics[UNSAFE].sample["k"][model.geometry.row("single", 1)]
    torch.testing.assert_close(sample, stacked(model, records, UNSAFE).float())


def test_safe_side_has_every_token(model, records, statistics):
    texts = [r.text for r in side(records, BENIGN)]
    expected = int(token_mask(model, texts, [None] * len(texts)).sum()) * len(TIMES)
    assert statistics[BENIGN].sample["q"].shape == (3, expected, 2, 16)


def test_reservoir_is_bounded_uniform_and_repeatable():
    stream = torch.arange(3000.0)[:, None]
    kept = []
    for seed in (0, 0, 1):
        reservoir = extract.Reservoir(300, seed)
        for chunk in stream.split(70):
            reservoir.add(chunk)
        kept.append(reservoir.items)
    assert kept[0].shape == (300, 1)
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert len(kept[0].unique()) == 300
    # mean of 300 of 0..2999: 1499.5 +- 50 (one sigma); first-come or last-come would be off by 1350
    assert kept[0].mean() == pytest.approx(1499.5, abs=200)


def test_statistics_survive_the_disk(tmp_path, statistics):
    extract.save_statistics(tmp_path / "s.safetensors", statistics)
    back = extract.load_statistics(tmp_path / "s.safetensors")
    for name, vectors in statistics.items():
        for role in "qk":
            assert torch.equal(back[name].gram[role], vectors.gram[role])
            assert torch.equal(back[name].sample[role], vectors.sample[role])


def test_text_picks_prompts():
    text = Text(torch.arange(6.0).view(3, 2, 1), torch.arange(3.0)[:, None])
    picked = text.pick(torch.tensor([2, 0]))
    assert picked.pooled[:, 0].tolist() == [2, 0] and picked.states[0, 0, 0] == 4
