"""The attention patch: that nothing gets past it, and what it does with the hook's odder inputs."""

import sys
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


@pytest.fixture(scope="module")
def least(core, make_flux):
    """A model of one block of each kind: tracing takes most of the time here, and blocks are alike."""
    return make_flux(core.Geometry(1, 1, 2, 128))


@pytest.fixture(scope="module")
def make_least(core, make_concept):
    return lambda **changes: make_concept(core.Geometry(1, 1, 2, 128), **changes)


SLOW = pytest.mark.slow  # every graph of the network takes PyTorch some seconds


@pytest.mark.parametrize(
    ("plain_first", "compile_first"),
    [(True, False), *(pytest.param(*order, marks=SLOW) for order in ((True, True), (False, False), (False, True)))],
)
def test_torch_compile_is_protected_in_every_order(
    apply, compiled, least, sample, make_least, compile_first, plain_first
):
    """A graph traced without the patch would be replayed: ComfyUI drops the guards that would notice."""
    concept = make_least()
    plain, protected = (sample(model, steps=2) for model in (least, apply(least, [concept], 1.0)))
    assert not torch.allclose(protected, plain, atol=1e-2)
    if plain_first:
        torch.testing.assert_close(sample(compiled(least), steps=2), plain)
    model = apply(compiled(least), [concept], 1.0) if compile_first else compiled(apply(least, [concept], 1.0))
    torch.testing.assert_close(sample(model, steps=2), protected)


def test_torch_compile_notices_a_second_patch_and_its_removal(apply, compiled, least, sample, make_least):
    concept, other = make_least(), make_least(slug="heart", seed=1)
    one, two = apply(least, [concept], 1.0), apply(apply(least, [concept], 1.0), [other], 1.0)
    models = (one, two, one, least)
    expected = [sample(model, steps=1) for model in models]
    assert not torch.equal(expected[0], expected[1])
    for model, latents in zip(models, expected, strict=True):
        torch.testing.assert_close(sample(compiled(model), steps=1), latents)


@SLOW
def test_a_graph_traced_amid_a_run_is_found_out(apply, comfy, compiled, least, sample, make_least):
    """In the second step another model's forward leaves a graph without the patch; ComfyUI has no guard against it."""
    from comfy.patcher_extension import WrappersMP

    concept = make_least()
    model = apply(compiled(least), [concept], 1.0)
    calls, called, patch = iter(range(1000)), [], patches(model)[0]

    def intruder(executor, *args, **kwargs):
        if next(calls) == 1:
            torch._dynamo.reset()
            executor(*args[:5], {**args[5], "patches": {}}, **kwargs)
            patch._now.called.clear()
        out = executor(*args, **kwargs)
        called.append(len(patch._now.called))
        return out

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "intruder", intruder)
    latents = sample(model, steps=2)
    assert called == [2, 0, 2], "the second forward was to miss the patch, its repetition not"
    torch.testing.assert_close(latents, sample(apply(least, [concept], 1.0), steps=2))


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


def test_what_other_patches_hold_is_not_written_to(apply, flux, sample, concept):
    """Alone, the patch writes into q and k; behind another, which may keep them, it does not.
    The pictures are equal."""
    held = []

    def keeper(q, k, v, pe=None, attn_mask=None, extra_options=None):
        held.append((q, q.clone()))
        return {}

    watched = flux.clone()
    watched.set_model_attn1_patch(keeper)
    latents = sample(apply(watched, [concept], 1.0), steps=1)
    assert held and all(torch.equal(q, before) for q, before in held)
    assert not torch.equal(latents, sample(flux, steps=1))

    made = []  # control: what the block made for the patch is written to where the patch is alone
    norm = flux.model.diffusion_model.single_blocks[0].norm.query_norm
    hook = norm.register_forward_hook(lambda _module, _args, q: made.append((q, q.clone())))
    assert torch.equal(sample(apply(flux, [concept], 1.0), steps=1), latents)
    hook.remove()
    assert made and not any(torch.equal(q, before) for q, before in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_are_made_before_the_network_runs(apply, make_flux, sample, concept, monkeypatch, dtype):
    """Once a sampling run, for the dtype that queries come in; and dropped after it."""
    model = make_flux(dtype=dtype)
    protected = apply(model, [concept], 1.0)
    patch, happened = patches(protected)[0], []
    prepare, answer = patch.protection._prepare, patch._now.answer
    monkeypatch.setattr(patch.protection, "_prepare", lambda *key: (happened.append(key), prepare(*key))[1])
    monkeypatch.setattr(patch._now, "answer", lambda block: (happened.append(block), answer(block))[1])
    monkeypatch.setattr(sys.modules[type(patch.protection).__module__], "form_of", lambda x: "plain")
    sample(protected, steps=2)
    assert happened[0] == (torch.device("cpu"), dtype) and happened.count(happened[0]) == 1 and len(happened) == 9
    assert not patch.protection._prepared
