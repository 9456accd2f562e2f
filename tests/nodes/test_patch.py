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
    plain, protected = (sample(model, steps=1) for model in (flux, apply(flux, [concept], 1.0)))
    assert not torch.allclose(protected, plain, atol=1e-2)
    if plain_first:
        torch.testing.assert_close(sample(compiled(flux), steps=1), plain)
    model = apply(compiled(flux), [concept], 1.0) if compile_first else compiled(apply(flux, [concept], 1.0))
    torch.testing.assert_close(sample(model, steps=1), protected)


def test_torch_compile_notices_a_second_patch_and_its_removal(apply, compiled, flux, sample, concept, make_concept):
    other = make_concept(slug="heart", seed=1)
    one, two = apply(flux, [concept], 1.0), apply(apply(flux, [concept], 1.0), [other], 1.0)
    models = (one, two, one, flux)
    expected = [sample(model, steps=1) for model in models]
    assert not torch.equal(expected[0], expected[1])
    for model, latents in zip(models, expected, strict=True):
        torch.testing.assert_close(sample(compiled(model), steps=1), latents)


def test_a_forward_that_passes_the_patch_by_is_an_error(apply, comfy, flux, sample, concept):
    from comfy.patcher_extension import WrappersMP

    def without_patches(executor, x, t, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
        return executor(x, t, context, y, guidance, ref_latents, control, {**transformer_options, "patches": {}})

    model = apply(flux, [concept], 1.0)
    sample(model)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", without_patches)
    with pytest.raises(RuntimeError, match=r"called in 0 of the 4 blocks.*would not be protected.*Remove the node"):
        sample(model)


def test_one_replaced_block_is_an_error(apply, flux, sample, concept):
    model = apply(flux, [concept], 1.0)
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    with pytest.raises(RuntimeError, match=r"called in 3 of the 4 blocks it protects \(not in \('single', 1\)\)"):
        sample(model)


def test_step_caches_may_skip_later_forwards(apply, comfy, flux, sample, concept):
    from comfy_extras.nodes_easycache import EasyCacheNode

    model = apply(flux, [concept], 1.0)
    cached = EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0]
    assert not torch.equal(sample(cached, steps=8), sample(model, steps=8))  # it did skip


def test_one_step_is_not_enough_for_a_whole_process(apply, flux, sample, concept):
    """What a run has proven is forgotten after it."""
    model = apply(flux, [concept], 1.0)
    sample(model)
    assert not patches(model)[0]._proven


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


@pytest.mark.parametrize(
    ("missing", "found"), [({"pe": None}, "without rotary positions"), ({"extra_options": {}}, "without img_slice")]
)
def test_another_forward_than_comfyuis_is_an_error(apply, flux, concept, missing, found):
    patch = patches(apply(flux, [concept], 1.0))[0]
    q = torch.randn(1, 2, 9, 128)
    where = {"block_type": "double", "block_index": 0}
    arguments = {"pe": torch.zeros(1), "extra_options": {"img_slice": [5, 9]}} | missing
    arguments["extra_options"] = arguments["extra_options"] | where
    with pytest.raises(RuntimeError, match=rf"{found}\. Expected q and k before RoPE"):
        patch(q, q, q, **arguments)
