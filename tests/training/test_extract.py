"""Extraction: the right tokens, the right times, and Gram matrices that stand for the stacked vectors."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saferope_core import BENIGN, PADDING, SUBJECT, UNSAFE, WORDS, unsafe_basis
from saferope_training.flux.attach import listening
from saferope_training.flux.models import Text, encode, noise, seeded_noise, text_tokens, velocity, with_cache
from saferope_training.making import extract
from saferope_training.making.material import fitting_material, make_latents
from saferope_training.prompts import side

TIMES = (1.0, 0.8, 0.5)


def words_of(model, text, mask):
    ids = model.pipe.tokenizer_2(text, padding="max_length", max_length=model.text_length).input_ids
    return model.pipe.tokenizer_2.convert_ids_to_tokens([token for token, used in zip(ids, mask, strict=True) if used])


def test_kinds_of_tokens_part_the_prompt(model, records):
    unsafe = side(records, UNSAFE)
    kinds = text_tokens(model, [r.text for r in unsafe], [r.subject for r in unsafe])
    assert set(kinds) == {SUBJECT, WORDS, PADDING}
    for row, record in enumerate(unsafe):
        found = {kind: words_of(model, record.text, mask[row]) for kind, mask in kinds.items()}
        assert found[SUBJECT] == ["star"]
        assert found[WORDS] == [word for word in record.text.split() if word != "star"] + ["</s>"]
        assert set(found[PADDING]) == {"<pad>"}
    assert not torch.stack(list(kinds.values())).sum(0).gt(1).any(), "no token is of two kinds"


def test_benign_prompts_have_words_and_as_much_padding(model):
    kinds = text_tokens(model, ["a red star , center"], [None])
    assert words_of(model, "a red star , center", kinds[WORDS][0]) == ["a", "red", "star", ",", "center", "</s>"]
    assert kinds[PADDING].sum() == 6 and not kinds[SUBJECT].any()


def test_a_long_prompt_has_no_padding(model):
    kinds = text_tokens(model, ["red " * 20], [None])
    assert kinds[WORDS].sum() == 21 and kinds[PADDING].sum() == model.text_length - 21


def test_a_subject_that_was_cut_off_is_refused(model):
    long = "red " * 40 + "star"
    with pytest.raises(ValueError, match=r"its subject 'star', .* is not whole within the first 24 tokens"):
        text_tokens(model, [long], [(160, 164)])


def test_walk_is_eulers_method_along_the_models_velocity(model):
    text = encode(model, ["a red star , center"])
    start = noise(model, 1, torch.Generator().manual_seed(0))
    seen, expected = [], []

    def listen(x, role, block_type, index, *spans, into=seen):
        if (role, block_type, index) == ("q", "single", 1):
            into.append(x.clone())

    extract.walk(model, text, start, (1.0, 0.9, 0.8), lambda: listen)
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


def stacked(model, records, name, kind):
    """Independent of Collector: every token's vectors of one single block, from full batches."""
    chosen = side(records, name)
    texts = [r.text for r in chosen]
    mask = text_tokens(model, texts, [r.subject for r in chosen])[kind]
    found = []

    def listen(x, role, block_type, index, text, image):
        if (role, block_type, index) == ("k", "single", 1):
            found.append(torch.stack([x[b, :, t] for b, t in mask.nonzero().tolist()]))

    start = seeded_noise(model, range(len(chosen)))
    extract.walk(model, encode(model, texts), start, TIMES, lambda: listen)
    return torch.cat(found)  # [n, H, D]


@pytest.fixture
def statistics(model, records):
    return extract.extract(model, records, TIMES, capacity=10_000, seed=0)


def test_basis_from_grams_is_the_svd_of_the_stacked_vectors(model, records, statistics):
    vectors = stacked(model, records, UNSAFE, SUBJECT)
    assert len(vectors) == 12 * 3
    row = model.geometry.row("single", 1)
    basis, values = unsafe_basis(statistics.vectors[UNSAFE, SUBJECT].gram["k"][row], rank=3)
    for head in range(2):
        left, singular, _ = torch.linalg.svd(vectors[:, head].double().T, full_matrices=False)
        torch.testing.assert_close(values[head], singular[:3], rtol=1e-6, atol=1e-6)
        overlap = torch.linalg.svdvals(left[:, :3].T @ basis[head])
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-9)
    other, _ = unsafe_basis(statistics.vectors[BENIGN, WORDS].gram["k"][row], rank=3)
    assert torch.linalg.svdvals(left[:, :3].T @ other[1]).min() < 0.999, "negative control: benign tokens span another"


@pytest.mark.parametrize("name, kind", [(UNSAFE, SUBJECT), (BENIGN, WORDS), (BENIGN, PADDING)])
def test_sample_holds_the_vectors_that_were_seen(model, records, statistics, name, kind):
    row = model.geometry.row("single", 1)
    sample = statistics.vectors[name, kind].sample["k"][row]
    expected = stacked(model, records, name, kind).bfloat16()
    assert sample.shape == expected.shape == (len(expected), 2, 16)
    for vectors in (sample, expected):  # in any order
        assert torch.equal(vectors.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)


def test_nothing_is_kept_that_nothing_is_read_from(statistics):
    assert statistics.vectors[UNSAFE, PADDING].sample["q"].shape[1] == 0
    assert statistics.vectors[UNSAFE, PADDING].gram["q"].any()


def test_met_is_what_attention_multiplies_with(model, records):
    """Keys meet RoPE'd queries: the ones that diffusers' attention hands to its kernel."""
    import torch.nn.functional as F

    chosen, seen, real = [side(records, UNSAFE)[0], side(records, BENIGN)[0]], [], F.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append(query.float().transpose(1, 2) if query.shape[1] == 2 else query.float())
        return real(query, key, *args, **kwargs)

    statistics = extract.extract(model, chosen, (1.0,), 10, seed=0)
    F.scaled_dot_product_attention = spy
    try:
        for record in chosen:
            velocity(model, seeded_noise(model, [0]), torch.ones(1), encode(model, [record.text]))
    finally:
        F.scaled_dot_product_attention = real
    per_forward = len(seen) // 2
    last = torch.cat([seen[per_forward - 1], seen[-1]]).flatten(0, 1)  # [n, H, D] of the last single block
    expected = torch.einsum("nhd,nhe->hde", last.double(), last.double())
    torch.testing.assert_close(statistics.met["k"][-1], expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert not torch.allclose(statistics.met["q"][-1], expected, rtol=0.1), "negative control: keys are others"


def test_statistics_survive_the_disk(tmp_path, model, statistics):
    extract.save_statistics(tmp_path / "s.safetensors", statistics)
    back = extract.load_statistics(tmp_path / "s.safetensors", model.geometry)
    for role in "qk":
        assert torch.equal(back.met[role], statistics.met[role])
        for each, vectors in statistics.vectors.items():
            assert torch.equal(back.vectors[each].gram[role], vectors.gram[role])
            assert torch.equal(back.vectors[each].sample[role], vectors.sample[role])


def test_text_picks_prompts():
    text = Text(torch.arange(6.0).view(3, 2, 1), torch.arange(3.0)[:, None])
    picked = text.pick(torch.tensor([2, 0]))
    assert picked.pooled[:, 0].tolist() == [2, 0] and picked.states[0, 0, 0] == 4


def batches_of(model, act):
    """How many prompts went through the transformer at once, in each pass of `act()`; and what it returned."""
    sizes = []
    handle = model.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        return sizes, act()
    finally:
        handle.remove()


def test_every_stage_obeys_passes_of(tmp_path, model, records, statistics):
    extracted, few = batches_of(model, lambda: extract.extract(model, records, TIMES, 10_000, 0, passes_of=2))
    torch.testing.assert_close(few.met["k"], statistics.met["k"], rtol=0.02, atol=0.02 * statistics.met["k"].max())
    assert few.vectors[UNSAFE, SUBJECT].sample["k"].shape == statistics.vectors[UNSAFE, SUBJECT].sample["k"].shape
    made, _ = batches_of(model, lambda: make_latents(model, records, TIMES, 0, tmp_path / "a", passes_of=2))
    fitted, _ = batches_of(model, lambda: fitting_material(model, records, TIMES, 0, passes_of=2))
    assert max(extracted) == max(made) == max(fitted) == 2
    whole, _ = batches_of(model, lambda: make_latents(model, records, TIMES, 0, tmp_path / "b"))
    assert max(whole) > 2, "control"


def test_encoders_are_gone_while_heads_are_listened_to(tmp_path, model, records):
    """Where they can be loaded again, and their embeddings lie in the cache."""
    pipe = copy.copy(model.pipe)
    encoders = pipe.text_encoder, pipe.text_encoder_2
    cached = replace(with_cache(model, tmp_path), pipe=pipe, source=SimpleNamespace(load=lambda: encoders))
    seen = []
    handle = model.transformer.register_forward_pre_hook(
        lambda *_: seen.append((pipe.text_encoder, pipe.text_encoder_2))
    )
    extract.extract(cached, records, TIMES, 100, 0)
    assert seen and set(seen) == {(None, None)}
    pipe.text_encoder, pipe.text_encoder_2 = encoders
    seen.clear()
    extract.extract(replace(cached, cache=None), records, TIMES, 100, 0)
    handle.remove()
    assert set(seen) == {encoders}, "control: without a cache they stay"
