"""Pipelines of other families: prompts within their chat templates, velocities, and a concept out of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

import saferope_core
from saferope_core import PADDING, SUBJECT, UNSAFE, WORDS, Concept, Gathering, Protection, Ranks, critical_heads
from saferope_training.flux.attach import attached, listening, positioned
from saferope_training.flux.models import encode, seeded_noise, text_tokens, velocity
from saferope_training.flux.pipelines import PIPELINES, asked, asked_of, tokenizer_of
from saferope_training.making.extract import walk
from tests.support.pipelines import FAMILIES, make_model

TEXT, WORD = "a red star , center", (6, 10)
OTHER = "a blue circle"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


def ids_of(model, text):
    """The tokens of the text in the transformer's stream, by the pipeline's own calls of its tokenizer."""
    seen = []
    row = asked(model)
    tokenizer = tokenizer_of(model.pipe)
    own = tokenizer.__class__.__call__

    def noted(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        if "input_ids" in out:
            seen.append(torch.as_tensor(out["input_ids"]))
        return out

    tokenizer.__class__.__call__ = noted
    try:
        row.encode(model.pipe, [text], model.text_length, model.device)
    finally:
        tokenizer.__class__.__call__ = own
    return torch.cat(seen, dim=1)[0][row.cut(model.pipe) :]


def test_every_pipeline_is_tested():
    assert set(PIPELINES) == {"flux", *FAMILIES} - {"flux2-dev"}
    with pytest.raises(ValueError, match="family 'sd3': its pipeline is not known, expected one of flux, chroma"):
        asked_of("sd3")


def test_text_is_encoded_to_one_length(model):
    text = encode(model, [TEXT, OTHER])
    assert text.states.shape[:2] == (2, model.text_length) and text.states.isfinite().all()
    assert not torch.equal(text.states[0], text.states[1])


def test_the_subject_is_found_within_the_template(model):
    kinds = text_tokens(model, [TEXT, OTHER], [WORD, None])
    ids = ids_of(model, TEXT)
    words = tokenizer_of(model.pipe)
    assert words.decode(ids[kinds[SUBJECT][0][: len(ids)]]).strip() == "star"
    both = kinds[SUBJECT][0] | kinds[WORDS][0]
    assert words.decode(ids[both[: len(ids)]]).replace("</s>", "").replace(" ", "") == TEXT.replace(" ", "")
    assert kinds[PADDING][0].any() and not (kinds[PADDING][0] & both).any()
    assert kinds[SUBJECT].shape == (2, model.text_length) and not kinds[SUBJECT][1].any()


def test_rope_is_the_transformers_own(model, monkeypatch):
    """What a concept's reach is read from is what the transformer's own attention gets."""
    own, calls, found = functional.scaled_dot_product_attention, [], {}

    def kept(query, key, *args, **kwargs):
        calls.append((query, key))
        return own(query, key, *args, **kwargs)

    text = encode(model, [TEXT, OTHER])
    rope = positioned(*asked(model).turns(model, text))

    def listen(x, role, kind, block, text, image):
        if block == 0 and kind == ("single" if model.geometry.single_blocks else "double"):
            found.setdefault(role, []).append((rope(x, text, image), text[1] > 0))

    monkeypatch.setattr(functional, "scaled_dot_product_attention", kept)
    with torch.no_grad(), listening(model.transformer, listen):
        velocity(model, seeded_noise(model, [0, 1]), torch.full((2,), 0.7), text, autocast=False)
    for role, place in (("q", 0), ("k", 1)):
        parts = sorted(found[role], key=lambda each: not each[1])  # text first
        expected = torch.cat([part for part, _ in parts], dim=2)
        gaps = [_gap(call[place], expected) for call in calls]
        assert min(gaps) < 1e-4, gaps


def _gap(seen, expected):
    """Between what attention got, [B, H, L, D] or [B, L, H, D], keys perhaps repeated, and what was expected."""
    for each in (seen, seen.transpose(1, 2)):
        if each.shape[2:] == expected.shape[2:] and each.shape[1] % expected.shape[1] == 0:
            repeated = expected.repeat_interleave(each.shape[1] // expected.shape[1], dim=1)
            return (each.float() - repeated).abs().max().item()
    return float("inf")


def _velocity(model):
    x = seeded_noise(model, [0, 1])
    with torch.no_grad():
        return velocity(model, x, torch.full((2,), 0.7), encode(model, [TEXT, OTHER]), autocast=False)


def test_velocities_depend_on_the_prompt(model):
    x = seeded_noise(model, [0, 0])
    with torch.no_grad():
        v = velocity(model, x, torch.full((2,), 0.7), encode(model, [TEXT, OTHER]), autocast=False)
    assert v.shape == x.shape and not torch.allclose(v[0], v[1])


def test_a_concept_is_made_and_turns(model):
    geometry = model.geometry
    gathering = Gathering(geometry, 64)
    for name, text, span in ((UNSAFE, TEXT, WORD), (saferope_core.BENIGN, OTHER, None)):
        kinds, said = text_tokens(model, [text] * 3, [span] * 3), encode(model, [text] * 3)
        rope = positioned(*asked(model).turns(model, said))
        visit = gathering.visit(name, kinds, 4, [1, 2, 3])

        def heard(visit=visit, rope=rope):
            visit.at_time()
            return lambda x, *where: visit.listen(x, rope(x, *where[-2:]), *where)

        walk(model, said, seeded_noise(model, [1, 2, 3]), (1.0, 0.8), heard)
    table = saferope_core.read_heads(gathering.statistics(), Ranks(2, 1, 1), "svd", 0.7, -1.0, "fixed", 0.99)
    heads = critical_heads(table, geometry)
    concept = Concept(
        slug="star",
        name="Star",
        description="",
        geometry=geometry,
        discrimination=table.discrimination,
        threshold=0.1,
        mode="fixed",
        **heads.fields(saferope_core.fixed_generators(heads, 2.0), "qk"),
    )
    plain, text = _velocity(model), encode(model, [TEXT, OTHER])
    assert text.states.shape[1] == model.text_length
    with attached(model.transformer, Protection([concept], geometry).rotate):
        assert not torch.allclose(_velocity(model), plain, atol=1e-4)
    assert torch.equal(_velocity(model), plain)
