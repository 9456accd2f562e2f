"""Never silently off: every known way past the patch is an error that names the node to move, or stays protected."""

import pytest
import torch

pytestmark = pytest.mark.host


def patch_of(model):
    return model.model_options["transformer_options"]["patches"]["attn1_patch"][0]


def without_patches(first=0):
    """A DIFFUSION_MODEL wrapper that hides the patches from the network, from its call number `first` on."""
    calls = iter(range(1000))

    def wrapper(executor, x, t, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
        hidden = {"patches": {}} if next(calls) >= first else {}
        return executor(x, t, context, y, guidance, ref_latents, control, {**transformer_options, **hidden}, **kwargs)

    return wrapper


@pytest.fixture(params=[True, False], ids=["after Apply", "before Apply"])
def with_node(request, apply, flux, concept):
    """with_node(change) -> a protected model that `change(clone)` was done to after SafeRoPE Apply, or before it."""

    def build(change):
        model = flux if not request.param else apply(flux, [concept], 1.0)
        clone = model.clone()
        change(clone)
        return clone if request.param else apply(clone, [concept], 1.0)

    return build


@pytest.fixture(scope="module")
def protected(apply, flux, sample, plain, concept):
    """What the protected model samples."""
    latents = sample(apply(flux, [concept], 1.0))
    assert not torch.allclose(latents, plain, atol=1e-2)
    return latents


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_wrapper_that_hides_the_patches_is_named(comfy, with_node, sample, first):
    """Also from the second or last step on, when the input shape is long known."""
    from comfy.patcher_extension import WrappersMP

    model = with_node(lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "pack", without_patches(first)))
    message = r"called in 0 of the 4 blocks.*not be protected.*wrapped by 'pack' \(\S*test_bypass\): remove that node"
    with pytest.raises(RuntimeError, match=message):
        sample(model)


@pytest.mark.parametrize("bare_first", [False, True])
def test_a_pass_without_the_patches_beside_one_with_them_is_named(comfy, with_node, sample, bare_first):
    """A wrapper that runs the network twice, once without its patches: the protected pass does not excuse the other."""
    from comfy.patcher_extension import WrappersMP

    bare = without_patches()

    def twice(executor, *args, **kwargs):
        passes = [lambda: executor(*args, **kwargs), lambda: bare(executor, *args, **kwargs)]
        first, _second = [each() for each in (passes[::-1] if bare_first else passes)]
        return first

    model = with_node(lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "pack", twice))
    with pytest.raises(RuntimeError, match=r"\('double', 0\).*in every pass.*wrapped by 'pack' \(\S*test_bypass\)"):
        sample(model)


@pytest.mark.parametrize("first", [0, 2])
def test_a_block_that_runs_without_its_patches_is_named(with_node, sample, first):
    calls = iter(range(1000))

    def replacement(args, extra):
        hidden = {"transformer_options": {}} if next(calls) >= first else {}
        return extra["original_block"](args | hidden)

    model = with_node(lambda m: m.set_model_patch_replace(replacement, "dit", "double_block", 1))
    with pytest.raises(RuntimeError, match=r"3 of the 4 .*\('double', 1\).*blocks: double_block 1, by \S*test_bypass"):
        sample(model)


def test_a_block_with_another_forward_is_named(with_node, sample):
    model = with_node(lambda m: m.set_model_patch_replace(lambda a, e: {"img": a["img"]}, "dit", "single_block", 1))
    with pytest.raises(RuntimeError, match=r"3 of the 4 .*Replaced blocks: single_block 1, by \S*test_bypass"):
        sample(model)


def test_a_block_replaced_by_itself_stays_protected(with_node, sample, protected):
    model = with_node(
        lambda m: m.set_model_patch_replace(lambda a, e: e["original_block"](a), "dit", "double_block", 0)
    )
    assert torch.equal(sample(model), protected)


def test_another_attention_stays_protected(comfy, with_node, sample, protected):
    """Sage and Flash nodes come after the rotation."""
    calls = []

    def override(function, *args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    def change(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = override

    assert torch.equal(sample(with_node(change)), protected)
    assert len(calls) == 4 * 4


def test_a_model_function_wrapper_stays_protected(with_node, sample, protected):
    def wrapper(apply_model, args):
        return apply_model(args["input"], args["timestep"], **args["c"])

    assert torch.equal(sample(with_node(lambda m: m.set_model_unet_function_wrapper(wrapper))), protected)


def test_a_model_function_wrapper_with_its_own_forward_is_named(with_node, sample):
    """It calls the network behind ComfyUI's back, so no wrapper of a forward is ever asked."""

    def wrapper(apply_model, args):
        return torch.zeros_like(args["input"])

    model = with_node(lambda m: m.set_model_unet_function_wrapper(wrapper))
    with pytest.raises(RuntimeError, match=r"no forward of the model.*function wrapper of \S*test_bypass: remove"):
        sample(model)


def test_no_steps_are_no_error(apply, comfy, flux, concept):
    """A sampler may be asked for none: there is no picture that could be unprotected."""
    import comfy.samplers

    model = apply(flux, [concept], 1.0)
    cond = [[torch.zeros(1, 5, 32), {"pooled_output": torch.zeros(1, 16)}]]
    noise = torch.zeros(1, 16, 8, 8)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        comfy.samplers.sample(
            model, noise, cond, cond, 1.0, torch.device("cpu"), sampler, torch.ones(1), latent_image=noise
        )


def test_a_network_put_in_place_after_apply_is_an_error(apply, flux, sample, concept, make_flux, core):
    class Wrapper(torch.nn.Module):
        dtype = torch.float32

    for network, found in (
        (Wrapper(), "a Wrapper"),
        (make_flux(core.Geometry(1, 3, 2, 128)).model.diffusion_model, "flux: 1 double"),
    ):
        model = apply(flux, [concept], 1.0)
        model.add_object_patch("diffusion_model", network)
        with pytest.raises(RuntimeError, match=f"the model that runs is {found}.*put SafeRoPE Apply after it"):
            sample(model)


def test_a_block_put_in_place_after_apply_is_an_error(apply, flux, sample, plain, concept):
    model = apply(flux, [concept], 1.0)
    model.add_object_patch("diffusion_model.single_blocks.1", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"single block 1 is a Identity.*Remove the node that replaces it"):
        sample(model)
    assert torch.equal(sample(flux), plain)


@pytest.mark.parametrize("order", ["cache first", "Apply first"])
def test_step_caches_may_skip_later_forwards(apply, comfy, flux, sample, concept, order):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model):
        return EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0]

    model = apply(cached(flux), [concept], 1.0) if order == "cache first" else cached(apply(flux, [concept], 1.0))
    latents = sample(model, steps=8)
    assert not torch.equal(latents, sample(apply(flux, [concept], 1.0), steps=8)), "it did not skip"
    assert not torch.allclose(latents, sample(cached(flux), steps=8), atol=1e-2)


def test_a_cache_of_another_run_is_an_error(apply, comfy, flux, sample, concept):
    """The first forward of a run must be a whole one, whatever earlier runs have shown."""
    from comfy.patcher_extension import WrappersMP

    kept = []

    def stale(executor, x, *args, **kwargs):
        if not kept:
            kept.append(executor(x, *args, **kwargs))
        return kept[0]

    model = apply(flux, [concept], 1.0)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", stale)
    sample(model)
    with pytest.raises(RuntimeError, match=r"called in 0 of the 4 blocks.*wrapped by 'cache'"):
        sample(model)


def test_nothing_of_an_audit_stays_behind(apply, comfy, make_flux, sample, concept):
    """Once the model is unloaded: until then the guard's hooks stay (test_guard.py)."""
    import comfy.model_management

    base = make_flux()
    model = apply(base, [concept], 1.0)
    sample(model)
    comfy.model_management.unload_all_models()
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    assert not [key for key in model.model_options["transformer_options"] if "saferope" in key]


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_merge_keeps_the_protection_of_the_first_model(apply, comfy, flux, make_flux, sample, plain, concept, ratio):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other = make_flux(seed=1)
    (merged,) = ModelMergeSimple().merge(flux, other, ratio)
    (after_apply,) = ModelMergeSimple().merge(apply(flux, [concept], 1.0), other, ratio)
    expected = sample(apply(merged, [concept], 1.0))
    assert torch.equal(sample(after_apply), expected)
    assert not torch.allclose(sample(merged), expected, atol=1e-2)
    assert torch.equal(sample(flux), plain), "weights are back"


def test_a_merge_takes_only_weights_from_the_second_model(apply, comfy, flux, make_flux, sample, concept):
    """ComfyUI merges weights and keeps the first model's patches alone: documented, Apply belongs after a merge."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    second = apply(make_flux(seed=1), [concept], 1.0)
    (merged,) = ModelMergeSimple().merge(flux, second, 0.5)
    (unprotected,) = ModelMergeSimple().merge(flux, make_flux(seed=1), 0.5)
    assert torch.equal(sample(merged), sample(unprotected))
    protected = sample(apply(merged, [concept], 1.0))
    assert not torch.allclose(protected, sample(merged), atol=1e-2)


def test_clones_of_clones_stay_protected(apply, flux, sample, protected, concept):
    model = apply(flux, [concept], 1.0)
    assert torch.equal(sample(model.clone().clone()), protected)
    assert torch.equal(sample(model), protected)


@pytest.mark.parametrize("scope", ["AllConditioning", "HookedOnly"])
def test_hooks_with_patches_of_their_own_stay_protected(apply, comfy, flux, concept, scope):
    """A hook's patch comes beside ours, for its conditioning or for all."""
    import comfy.hooks
    import comfy.samplers

    calls = []

    def other(q, k, v, pe=None, attn_mask=None, extra_options=None):
        calls.append(extra_options["cond_or_uncond"])
        return {}

    def run(model, hooked):
        random = torch.Generator().manual_seed(2)
        conds = [
            [[torch.randn(1, 5, 32, generator=random), {"pooled_output": torch.randn(1, 16, generator=random)}]]
            for _ in range(2)
        ]
        if hooked:
            hook = comfy.hooks.TransformerOptionsHook({"patches": {"attn1_patch": [other]}})
            hook.hook_scope = comfy.hooks.EnumHookScope[scope]
            conds[0][0][1]["hooks"] = comfy.hooks.HookGroup()
            conds[0][0][1]["hooks"].add(hook)
        noise = torch.randn(1, 16, 8, 8, generator=random)
        sampler = comfy.samplers.KSampler(
            model, 2, torch.device("cpu"), "euler", "simple", model_options=model.model_options
        )
        with torch.inference_mode():
            return sampler.sample(noise, *conds, cfg=3.0, latent_image=torch.zeros_like(noise), disable_pbar=True)

    model = apply(flux, [concept], 1.0)
    hooked = run(model, True)
    assert [0] in calls
    torch.testing.assert_close(hooked, run(model, False), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hooked, run(flux, False), atol=1e-2)


DOUBLE = {"block_type": "double", "block_index": 0, "img_slice": [5, 9]}
FOREIGN = {
    "Wan: one dictionary": (({"x": 0, "q": 0, "k": 0},), {}, r"\(None, None\) was reached that the model"),
    "Wan: one dictionary, by name": (({"x": 0},), {"extra_options": DOUBLE}, "with a dict and a NoneType for q and k"),
    "Cosmos: before projection": (
        (torch.zeros(1, 1, 3, 3, 256),) * 3,
        {"extra_options": DOUBLE},
        r"with q of shape \[1, 1, 3, 3, 256\], not \[B, 2, L, 128\]",
    ),
    "UNet: no heads yet": ((torch.zeros(1, 9, 256),) * 3 + ({"block_index": 0},), {}, r"\(None, None\) was reached"),
    "other heads": ((torch.zeros(1, 4, 9, 128),) * 3, {"extra_options": DOUBLE}, r"q of shape \[1, 4, 9, 128\]"),
    "other head_dim": ((torch.zeros(1, 2, 9, 64),) * 3, {"extra_options": DOUBLE}, r"q of shape \[1, 2, 9, 64\]"),
    "fewer heads in k": (
        (torch.zeros(1, 2, 9, 128), torch.zeros(1, 1, 9, 128), torch.zeros(1, 1, 9, 128)),
        {"extra_options": DOUBLE},
        r"with k of shape \[1, 1, 9, 128\]",
    ),
    "k shorter than q": (
        (torch.zeros(1, 2, 9, 128), torch.zeros(1, 2, 8, 128), torch.zeros(1, 2, 8, 128)),
        {"extra_options": DOUBLE},
        "9 queries and 8 keys",
    ),
    "a block too many": (
        (torch.zeros(1, 2, 9, 128),) * 3,
        {"extra_options": DOUBLE | {"block_index": 2}},
        r"\('double', 2\) was reached that the model should not have .double block 2 asked for",
    ),
    "another kind of block": (
        (torch.zeros(1, 2, 9, 128),) * 3,
        {"extra_options": DOUBLE | {"block_type": "triple"}},
        "block type 'triple'",
    ),
    "no span": (
        (torch.zeros(1, 2, 9, 128),) * 3,
        {"extra_options": {"block_type": "double", "block_index": 0}},
        "without img_slice",
    ),
    "a span of other tokens": (
        (torch.zeros(1, 2, 9, 128),) * 3,
        {"extra_options": DOUBLE | {"img_slice": [5, 8]}},
        r"img_slice \[5, 8\], 9 queries",
    ),
    "a span from behind": (
        (torch.zeros(1, 2, 9, 128),) * 3,
        {"extra_options": DOUBLE | {"img_slice": [12, 9]}},
        r"img_slice \[12, 9\]",
    ),
    "after RoPE": ((torch.zeros(1, 2, 9, 128),) * 3, {"extra_options": DOUBLE, "pe": None}, "without rotary positions"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_hook_than_fluxs_is_an_error(apply, flux, concept, name):
    args, kwargs, found = FOREIGN[name]
    patch = patch_of(apply(flux, [concept], 1.0))
    if len(args) < 4:
        kwargs = {"pe": torch.zeros(1)} | kwargs
    with pytest.raises(RuntimeError, match=f"{found}.*Expected q and k before RoPE.*Remove the node"):
        patch(*args, **kwargs)


def test_flux_s_own_hook_is_none(apply, flux, concept):
    """The negative control of the errors above: the same call as ComfyUI makes it."""
    q = torch.randn(1, 2, 9, 128)
    out = patch_of(apply(flux, [concept], 1.0))(q, q, q, pe=torch.zeros(1), attn_mask=None, extra_options=DOUBLE)
    assert not torch.equal(out["q"], q) and not torch.equal(out["k"], q)


def test_a_compiling_node_is_named(comfy, with_node, sample):
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def change(model):
        set_torch_compile_wrapper(model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "pack", without_patches())

    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError) as caught:
        sample(with_node(change))
    assert "wrapped by 'pack'" in str(caught.value)
    assert str(caught.value).endswith("The model is compiled: put SafeRoPE Apply before TorchCompileModel.")
