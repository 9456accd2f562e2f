"""Every class of diffusers' that the trainer reaches: right blocks, right spans, and the rotation as it is written."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import saferope_core
from saferope_core import FAMILIES, Geometry, Protection
from saferope_training.flux.attach import LAYOUTS, attached, geometry_of, listening
from tests.support import concepts as flat
from tests.support.diffusers_models import IMAGE, TEXT, TINY
from tests.support.naive import transcribed

CLOSE = 1e-3  # of what protection changes: float32 through a network, against float64
SINGLE = [name for name, tiny in TINY.items() if tiny.geometry[1]]


@pytest.fixture(params=TINY)
def family(request):
    return request.param


@pytest.fixture
def tiny(family):
    return TINY[family]


@pytest.fixture
def model(tiny):
    return tiny.make()


@pytest.fixture
def geometry(family, tiny):
    double, single, heads, head_dim, keys = tiny.geometry
    return Geometry(double, single, heads, head_dim, family, keys)


@pytest.fixture
def concept(geometry):
    return flat.in_all_heads(saferope_core, geometry)


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs)[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


@contextmanager
def written_out(tiny, model, concept):
    """While it lasts, the norms themselves turn what they give, by the transcription."""
    count, handles = 0, []
    for module, kind, index, role, stream in tiny.places(model):

        def turned(_module, _args, output, kind=kind, index=index, role=role, stream=stream):
            x = output if tiny.heads_first else output.transpose(1, 2)
            text = {"text": x.shape[2], "image": 0, "both": tiny.text}[stream]
            behind = tiny.text if stream == "both" and tiny.ends else 0
            x = transcribed(concept, x.roll(behind, 2), role, kind, index, text).roll(-behind, 2)
            return x if tiny.heads_first else x.transpose(1, 2).contiguous()

        handles.append(module.register_forward_hook(turned))
        count += 1
    assert count == sum(1 for kind in concept.heads[:, :2].unique(dim=0)[:, 0] for _ in range(2 if kind else 4))
    yield
    for handle in handles:
        handle.remove()


def test_every_class_is_tested(family):
    assert {layout.family for layout in LAYOUTS.values()} == set(TINY) <= set(FAMILIES)
    assert LAYOUTS[TINY[family].name].family == family


def test_geometry_has_its_own_family(model, geometry):
    assert geometry_of(model) == geometry


def test_a_class_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"got a Linear, expected one of FluxTransformer2DModel, Flux2"):
        geometry_of(torch.nn.Linear(1, 1))


def test_protection_is_the_transcription(tiny, model, geometry, concept):
    inputs, protection = tiny.inputs(), Protection([concept], geometry)
    plain = run(model, inputs)
    with written_out(tiny, model, concept):
        expected = run(model, inputs)
    with attached(model, protection.rotate):
        protected = run(model, inputs)
    change = (expected - plain).norm()
    assert change > 1e-3 * plain.norm(), "nothing to tell them apart by"
    assert (protected - expected).norm() < CLOSE * change
    assert torch.equal(run(model, inputs), plain), "the hooks are off"


def test_looking_changes_nothing(tiny, model):
    inputs, seen = tiny.inputs(), []
    plain = run(model, inputs)
    with listening(model, lambda x, *where: seen.append(where)):
        assert torch.equal(run(model, inputs), plain)
    assert {(kind, block) for _, kind, block, *_ in seen} == {
        (kind, block)
        for kind, count in zip(("double", "single"), tiny.geometry, strict=False)
        for block in range(count)
    }


@pytest.mark.parametrize("family", SINGLE, indirect=True)
def test_spans_of_single_blocks_hold_their_stream(tiny):
    """Before the first attention another prompt changes the text's vectors alone, another picture the picture's."""
    doubles = {} if tiny.name in ("Krea2Transformer2DModel", "ZImageTransformer2DModel") else {"num_layers": 0}
    model = replace(tiny).make(**doubles)
    inputs = tiny.inputs()
    names = ("x", "cap_feats") if "x" in inputs else ("hidden_states", "encoder_hidden_states")
    before, spans = _first(model, inputs)
    assert spans == ([(32, 64), (0, 32)] if tiny.text == 32 else _both(tiny))
    for changed, name in zip(("image", "text"), names, strict=True):
        value = inputs[name]
        other = [3 - each for each in value] if isinstance(value, list) else 3 - value
        after, _ = _first(model, inputs | {name: other})
        moved = (after != before).any(-1).any(1).all(0)
        own = dict(zip(("text", "image"), spans, strict=True))[changed]
        expected = torch.zeros_like(moved)
        expected[slice(*own)] = True  # padding too, which Z-Image's refiners let attend
        assert torch.equal(moved, expected), changed


def _both(tiny):
    whole = TEXT + IMAGE
    return [(IMAGE, whole), (0, IMAGE)] if tiny.ends else [(0, TEXT), (TEXT, whole)]


def _first(model, inputs):
    """Queries of the first single block, and its spans of text and image."""
    found = []

    def keep(x, role, kind, block, text, image):
        if (role, kind, block) == ("q", "single", 0):
            found.append((x.clone(), [text, image]))

    with listening(model, keep):
        run(model, inputs)
    return found[0]
