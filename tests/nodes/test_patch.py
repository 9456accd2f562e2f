"""The attention patch: that nothing gets past it, and what it does with the hook's odder inputs."""

import threading

import pytest
import torch

pytestmark = pytest.mark.host


def patches(model):
    return model.model_options["transformer_options"]["patches"]["attn1_patch"]


@pytest.fixture
def compiled(comfy):
    """Core's TorchCompileModel, without the minutes of its default backend; graphs of earlier tests are dropped."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    torch._dynamo.reset()
    yield lambda model: TorchCompileModel.execute(model, "eager")[0]
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_first", [False, True])
@pytest.mark.parametrize("plain_first", [False, True])
def test_torch_compile_is_protected_in_every_order(apply, compiled, flux, sample, concept, compile_first, plain_first):
    """A graph traced without the patch would be replayed: ComfyUI drops the guards that would notice."""
    plain, protected = (sample(model, steps=2) for model in (flux, apply(flux, [concept], 1.0)))
    assert not torch.allclose(protected, plain, atol=1e-2)
    if plain_first:
        torch.testing.assert_close(sample(compiled(flux), steps=2), plain)
    model = apply(compiled(flux), [concept], 1.0) if compile_first else compiled(apply(flux, [concept], 1.0))
    torch.testing.assert_close(sample(model, steps=2), protected)


def test_torch_compile_notices_a_second_patch_and_its_removal(apply, compiled, flux, sample, concept, make_concept):
    other = make_concept(slug="heart", seed=1)
    one, two = apply(flux, [concept], 1.0), apply(apply(flux, [concept], 1.0), [other], 1.0)
    models = (one, two, one, flux)
    expected = [sample(model, steps=1) for model in models]
    assert not torch.equal(expected[0], expected[1])
    for model, latents in zip(models, expected, strict=True):
        torch.testing.assert_close(sample(compiled(model), steps=1), latents)


def test_a_forward_outside_of_sampling_is_protected(apply, flux, concept):
    patch = patches(apply(flux, [concept], 1.0, end_percent=0.5))[0]
    q = torch.randn(1, 2, 9, 128)
    options = {"block_type": "double", "block_index": 0, "img_slice": [5, 9]}
    out = patch(q, q, q, pe=torch.zeros(1), extra_options=options)
    assert not torch.equal(out["q"], q)


def test_threads_do_not_share_a_forward(apply, flux, concept):
    """One patch object serves several GPUs' threads: a step out of range on one must not switch another off."""
    patch = patches(apply(flux, [concept], 1.0))[0]
    patch._now.acting = False
    seen = []
    thread = threading.Thread(target=lambda: seen.append(patch._now.acting))
    thread.start()
    thread.join()
    assert seen == [True]


def test_keys_of_a_cache_are_image_tokens(apply, flux, concept):
    """FluxKVCache makes k longer than q: both begin with the text, each has an image span of its own length."""
    patch = patches(apply(flux, [concept], 1.0))[0]
    k = torch.randn(1, 2, 14, 128)
    options = {"block_type": "single", "block_index": 1, "img_slice": [5, 9]}
    short = patch(k[:, :, :9], k[:, :, :9], k, pe=torch.zeros(1), extra_options=options)
    long = patch(k[:, :, :9], k, k, pe=torch.zeros(1), extra_options=options)
    torch.testing.assert_close(long["k"][:, :, :9], short["k"])
    assert not torch.equal(long["k"][:, :1, 9:], k[:, :1, 9:])
    assert torch.equal(long["k"][:, 1:], k[:, 1:])  # the second head is not safety-critical
