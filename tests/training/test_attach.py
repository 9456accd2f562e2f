"""The hooks: where they sit, what they see, that they change what they should and nothing else, and that
they come off."""

from __future__ import annotations

import pytest
import torch

from saferope_training.flux.attach import attached, geometry_of, listening, sites

TEXT, IMAGE = 5, 4  # tokens of the `inputs` fixture


def hook_count(flux) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in flux.modules())


def run(flux, inputs):
    with torch.no_grad():
        return flux(**inputs)[0]


def collect(flux, inputs):
    seen = {}
    with listening(flux, lambda x, *where: seen.setdefault(where[:3], []).append((x.clone(), *where[3:]))):
        run(flux, inputs)
    return seen


def test_geometry_is_read_from_the_config(flux):
    assert geometry_of(flux).describe() == "flux: 1 double + 2 single blocks x 2 heads x 16"


def test_hooks_come_off(flux, inputs):
    before = hook_count(flux)
    with attached(flux, lambda x, *where: x):
        assert hook_count(flux) == before + 1 + 4 * 1 + 2 * 2, "a pre-hook, 4 norms per double and 2 per single block"
    assert hook_count(flux) == before


def test_hooks_come_off_after_an_exception_in_a_block(flux, inputs):
    before = hook_count(flux)

    def fail(x, role, block_type, *rest):
        if block_type == "single":
            raise RuntimeError("in the middle")
        return x

    with pytest.raises(RuntimeError, match="in the middle"), attached(flux, fail):
        run(flux, inputs)
    assert hook_count(flux) == before


def test_hooks_come_off_when_attaching_itself_fails(flux):
    before = hook_count(flux)
    del flux.single_transformer_blocks[1].attn.norm_k
    with pytest.raises(AttributeError), attached(flux, lambda x, *where: x):
        pass
    assert hook_count(flux) == before


@pytest.mark.parametrize("identity", [lambda x, *where: x, lambda x, *where: None, lambda x, *where: x.clone()])
def test_identity_is_bit_identical(flux, inputs, identity):
    expected = run(flux, inputs)
    with attached(flux, identity):
        assert torch.equal(run(flux, inputs), expected)


def test_a_real_change_reaches_the_output(flux, inputs):
    """Negative control of the identity test: the hooks' return value is used, in every block and for both roles."""
    expected = run(flux, inputs)
    for site in [("q", "double", 0), ("k", "double", 0), ("q", "single", 1), ("k", "single", 1)]:
        with attached(flux, lambda x, *where, site=site: x.flip(-1) if where[:3] == site else x):
            assert not torch.equal(run(flux, inputs), expected), site


def test_streams_and_spans(flux, inputs):
    seen = collect(flux, inputs)
    assert set(seen) == {(role, *block) for role in "qk" for block in (("double", 0), ("single", 0), ("single", 1))}
    for (_role, block_type, _index), calls in seen.items():
        spans = [(x.shape[1:], text, image) for x, text, image in calls]
        if block_type == "single":
            assert spans == [((2, TEXT + IMAGE, 16), (0, TEXT), (TEXT, TEXT + IMAGE))]
        else:
            whole = {((2, TEXT, 16), (0, TEXT), (0, 0)), ((2, IMAGE, 16), (0, 0), (0, IMAGE))}
            assert {(tuple(shape), text, image) for shape, text, image in spans} == whole


@pytest.mark.parametrize("changed, stream", [("encoder_hidden_states", 0), ("hidden_states", 1)])
def test_text_span_holds_text(flux, inputs, changed, stream):
    """In the first double block each stream's vectors depend on its own input alone: spans that swapped would show."""
    other = {**inputs, changed: inputs[changed].roll(1, dims=1)}
    before, after = (collect(flux, each)["k", "double", 0] for each in (inputs, other))
    for (x, text, image), (y, *_) in zip(before, after, strict=True):
        of_changed_stream = (image if stream else text)[1] > 0
        assert torch.equal(x, y) != of_changed_stream


def test_listening_sees_exactly_the_norms_outputs(flux, inputs):
    expected, handles = {}, []
    for site in sites(flux):
        where = (site.role, site.block_type, site.block_index, site.stream)

        def keep(module, args, output, where=where):
            expected[where] = output.transpose(1, 2).clone()

        handles.append(site.module.register_forward_hook(keep))
    untouched = run(flux, inputs)
    for handle in handles:
        handle.remove()
    seen = collect(flux, inputs)
    for (role, block_type, index), calls in seen.items():
        for x, text, image in calls:
            stream = "both" if text[1] and image[1] else "text" if text[1] else "image"
            assert torch.equal(x, expected[role, block_type, index, stream])
    assert torch.equal(run(flux, inputs), untouched)


def test_text_length_is_read_from_positional_arguments_too(flux, inputs):
    positional = [inputs.pop("hidden_states"), inputs.pop("encoder_hidden_states")]
    seen = []
    with listening(flux, lambda x, *where: seen.append(where)), torch.no_grad():
        flux(*positional, **inputs)
    assert ("q", "single", 0, (0, TEXT), (TEXT, TEXT + IMAGE)) in seen


def test_inner_context_sees_what_the_outer_one_made(flux, inputs):
    seen = {}
    with attached(flux, lambda x, *where: torch.zeros_like(x)):
        with listening(flux, lambda x, *where: seen.setdefault(where, x)):
            run(flux, inputs)
    assert all(not x.any() for x in seen.values())
