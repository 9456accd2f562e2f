"""Right in every layout: protected samples equal those of a reference whose token spans the test works out by itself.

The reference is an attention patch of its own on the unprotected model. It knows the text's length from the prompt and
checks the number of tokens from the latent's size, where the node reads ComfyUI's `img_slice`. Every case also differs
from the unprotected model.
"""

import copy
import importlib
import threading
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
TEXT, LONG = 5, 9  # tokens of a prompt, and of a longer one


def image_tokens(height, width):
    """Latent rows and columns -> tokens: two by two, padded to even."""
    return -(-height // 2) * -(-width // 2)


def prompt(tokens=TEXT, seed=0, width=32, **more):
    random = torch.Generator().manual_seed(seed)
    hidden, pooled = (torch.randn(shape, generator=random) for shape in ((1, tokens, width), (1, 16)))
    return [[hidden, {"pooled_output": pooled, **more}]]


def latent(height=8, width=8, batch=1, channels=16, seed=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


class Reference:
    """An attn1_patch that rotates by spans looked up in `texts`: number of tokens -> how many of them are text.

    Another number of tokens is a KeyError: the layout is not the one the test thinks of.
    """

    def __init__(self, protection, texts):
        self.protection, self.texts, self.seen = protection, texts, set()

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        block = (extra_options["block_type"], extra_options["block_index"])
        self.seen.add((q.shape[2], k.shape[2], q.shape[0], q.dtype))
        return {role: self._rotated(x, role, block) for role, x in (("q", q), ("k", k))}

    def _rotated(self, x, role, block):
        text = self.texts[x.shape[2]]
        return self.protection.rotate(x, role, *block, text=(0, text), image=(text, x.shape[2]))


@pytest.fixture
def run(comfy):
    """run(model, positive, negative, noise, ...) -> latents of two steps."""
    import comfy.samplers

    def sample(model, positive, negative=None, noise=None, cfg=1.0, steps=2, denoise=1.0, start=None, mask=None):
        noise = latent() if noise is None else noise
        start = torch.zeros_like(noise) if start is None else start
        sampler = comfy.samplers.KSampler(
            model, steps, CPU, "euler", "simple", denoise=denoise, model_options=model.model_options
        )
        arguments = {"cfg": cfg, "latent_image": start, "denoise_mask": mask, "disable_pbar": True}
        with torch.inference_mode():
            return sampler.sample(noise, copy.copy(positive), copy.copy(negative or positive), **arguments)

    return sample


@pytest.fixture
def check(apply, core, run, concept):
    """check(model, texts, positive, ...) -> the reference: protected equals it, and differs from the unprotected."""

    def compare(model, texts, *args, node=lambda model: model, concept=concept, geometry=None, exact=True, **kwargs):
        reference = Reference(core.Protection([concept], geometry or concept.geometry), texts)
        expected = model.clone()
        expected.set_model_attn1_patch(reference)
        expected, protected = (run(node(each), *args, **kwargs) for each in (expected, apply(model, [concept], 1.0)))
        torch.testing.assert_close(protected, expected, **({"rtol": 0, "atol": 0} if exact else {}))
        plain = run(node(model), *args, **kwargs)
        assert expected.isfinite().all()
        assert (expected - plain).norm() > 1e-3 * plain.norm(), "nothing to tell them apart by"
        return reference

    return compare


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (2, 30), (31, 2), (1, 1), (24, 40)])
def test_any_resolution(check, flux, height, width):
    count = image_tokens(height, width)
    check(flux, {TEXT + count: TEXT}, prompt(), noise=latent(height, width))


@pytest.mark.parametrize("tokens", [1, 77])
def test_any_length_of_prompt(check, flux, tokens):
    check(flux, {tokens + 16: tokens}, prompt(tokens))


def test_batches_with_a_negative_prompt(check, flux):
    reference = check(flux, {TEXT + 16: TEXT}, prompt(), prompt(seed=1), noise=latent(batch=2), cfg=3.0)
    assert {rows for _, _, rows, _ in reference.seen} == {4}, "both prompts were to share a forward"


def test_prompts_of_different_length(check, flux):
    check(flux, {TEXT + 16: TEXT, LONG + 16: LONG}, prompt(), prompt(LONG, seed=1), cfg=3.0)


@pytest.mark.parametrize("tokens", [TEXT, LONG])
def test_several_positive_prompts(check, comfy, flux, tokens):
    from nodes import ConditioningCombine

    (combined,) = ConditioningCombine().combine(prompt(), prompt(tokens, seed=1))
    check(flux, {TEXT + 16: TEXT, tokens + 16: tokens}, combined, prompt(seed=2), cfg=3.0)


def test_positive_only_tells_chunks_of_combined_prompts_apart(apply, comfy, flux, run, concept):
    """Two positives and a negative in one forward: the negative row is that of the unprotected model."""
    from comfy_extras.nodes_custom_sampler import CFGGuider  # noqa: F401  (the guider these indices belong to)

    from nodes import ConditioningCombine

    (combined,) = ConditioningCombine().combine(prompt(), prompt(seed=1))
    kept = {}

    def keep(name):
        def post_cfg(args):
            kept[name] = (args["cond_denoised"].clone(), args["uncond_denoised"].clone())
            return args["denoised"]

        return post_cfg

    part = apply(flux, [concept], 1.0, conditionings="positive only")
    for name, model in (("plain", flux), ("all", apply(flux, [concept], 1.0)), ("part", part)):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(keep(name))
        run(model, combined, prompt(seed=2), cfg=3.0, steps=1)
    torch.testing.assert_close(kept["part"][0], kept["all"][0])
    torch.testing.assert_close(kept["part"][1], kept["plain"][1])
    assert not torch.allclose(kept["all"][1], kept["plain"][1], atol=1e-2)


def test_concatenated_prompts(check, comfy, flux):
    from nodes import ConditioningConcat

    (long,) = ConditioningConcat().concat(prompt(), prompt(LONG, seed=1))
    check(flux, {TEXT + LONG + 16: TEXT + LONG}, long)


@pytest.mark.parametrize("strength_type", ["multiply", "attn_bias"])
def test_redux_tokens_count_as_text(check, comfy, flux, strength_type):
    """StyleModelApply puts a picture's tokens behind the prompt's; attn_bias weighs them by an attention mask."""
    import comfy.sd
    from comfy.ldm.flux.redux import ReduxImageEncoder

    from nodes import StyleModelApply

    encoder = ReduxImageEncoder(redux_dim=12, txt_in_features=32)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    seen = SimpleNamespace(last_hidden_state=torch.randn(1, 6, 12))
    with torch.no_grad():
        (styled,) = StyleModelApply().apply_stylemodel(prompt(), comfy.sd.StyleModel(encoder), seen, 0.5, strength_type)
    assert ("attention_mask" in styled[0][1]) == (strength_type == "attn_bias")
    check(flux, {TEXT + 6 + 16: TEXT + 6}, styled)


def test_areas(check, comfy, flux):
    from nodes import ConditioningCombine, ConditioningSetArea

    (part,) = ConditioningSetArea().append(prompt(seed=1), 64, 96, 0, 32, 1.0)  # 8 x 12 of the latent
    (both,) = ConditioningCombine().combine(prompt(), part)
    check(flux, {TEXT + 64: TEXT, TEXT + 24: TEXT}, both, noise=latent(16, 16))


METHODS = ["offset", "index", "uxo/uno"]  # "index_timestep_zero" fails in ComfyUI's own FLUX.1 blocks: see FLUX.2


def referring(positive, references, method=None):
    """Conditioning with reference pictures, as ReferenceLatent and FluxKontextMultiReferenceLatentMethod make it."""
    from comfy_extras.nodes_edit_model import ReferenceLatent
    from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod

    for samples in references:
        positive = ReferenceLatent.execute(positive, {"samples": samples})[0]
    return FluxKontextMultiReferenceLatentMethod.execute(positive, method)[0] if method else positive


@pytest.mark.parametrize("method", [None, *METHODS])
def test_tokens_of_reference_pictures_count_as_image(check, comfy, flux, method):
    """Kontext: behind the generated picture's, of other sizes, odd ones too."""
    kontext = referring(prompt(), [latent(4, 6), latent(5, 3)], method)
    check(flux, {TEXT + 16 + 6 + 6: TEXT}, kontext)


def test_image_to_image(check, flux):
    check(flux, {TEXT + 16: TEXT}, prompt(), denoise=0.5, start=latent(seed=4))


def test_inpainting(check, flux):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    check(flux, {TEXT + 16: TEXT}, prompt(), denoise=0.8, start=latent(seed=4), mask=mask)


def test_inpainting_models(check, comfy, make_flux):
    """FLUX Fill: mask and masked picture come in as channels, the tokens stay as they are."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    fill = make_flux(in_channels=16 + 16 + 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    positive = prompt(concat_latent_image=latent(seed=4), concat_mask=mask)
    check(fill, {TEXT + 16: TEXT}, positive, node=lambda model: DifferentialDiffusion.execute(model)[0])


def test_a_controlnet_is_left_alone(check, comfy, flux):
    """Its blocks are FLUX blocks too, but call no patches; what it adds to the model's blocks is not touched."""
    import comfy.controlnet
    import comfy.ops
    from comfy.ldm.flux.controlnet import ControlNetFlux

    from nodes import ControlNetApplyAdvanced

    params = {k: v for k, v in vars(flux.model.diffusion_model.params).items() if k != "depth_single_blocks"}
    network = ControlNetFlux(
        depth_single_blocks=1, operations=comfy.ops.manual_cast, dtype=torch.float32, device=CPU, **params
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.06)
    control = comfy.controlnet.ControlNet(network, load_device=CPU, extra_conds=["y", "guidance"])
    image = torch.rand(1, 64, 64, 3)
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        prompt(), prompt(seed=1), control, image, 0.7, 0.0, 1.0
    )
    reference = check(flux, {TEXT + 16: TEXT}, positive, negative, cfg=3.0)
    assert reference.seen


def test_skip_layer_guidance(check, comfy, flux):
    """Its second forward of a step leaves a block out, which is no attention without protection."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def node(model):
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "0")[0]

    check(flux, {TEXT + 16: TEXT}, prompt(), prompt(seed=1), cfg=3.0, node=node)


def test_guidance_by_attention_outputs(check, comfy, flux):
    """NAG adds rows of a negative prompt and mixes what attention gives for them."""
    from comfy_extras.nodes_nag import NAGuidance

    def node(model):
        return NAGuidance.execute(model, 5.0, 0.5, 1.5)[0]

    check(flux, {TEXT + 16: TEXT}, prompt(), prompt(seed=1), cfg=3.0, node=node)


def test_scaled_positions(check, comfy, flux):
    from comfy_extras.nodes_rope import ScaleROPE

    def node(model):
        return ScaleROPE.execute(model, 1.5, 2.0, 0.5, 1.0, 0.0, 0.0)[0]

    check(flux, {TEXT + 16: TEXT}, prompt(), node=node)


def lora(flux):
    """A small LoRA file's tensors on one layer of each kind of block."""
    tensors = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        layer = flux.model.diffusion_model.get_submodule(name)
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, layer.in_features) * 0.1
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(layer.out_features, 2) * 0.1
    return tensors


@pytest.fixture
def with_lora(comfy, flux):
    import comfy.sd

    tensors = lora(flux)
    return lambda model: comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


@pytest.mark.parametrize("order", ["LoRA first", "Apply first"])
def test_loras(check, flux, run, with_lora, order):
    before = run(flux, prompt())
    assert not torch.allclose(run(with_lora(flux), prompt()), before, atol=1e-2), "the LoRA was to do something"
    if order == "LoRA first":
        check(with_lora(flux), {TEXT + 16: TEXT}, prompt())
    else:
        check(flux, {TEXT + 16: TEXT}, prompt(), node=with_lora)
    assert torch.equal(run(flux, prompt()), before), "weights are back"


def test_weights_left_outside_of_memory(check, comfy, make_flux, with_lora, monkeypatch):
    """Low VRAM: layers cast their weights, and add the LoRA's, each time they run. Forced, since a CPU has but one."""
    import comfy.model_patcher

    load, partial = comfy.model_patcher.ModelPatcher.load, []

    def little(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, 1, force_patch_weights, full_load=False)
        partial.append(self.model.model_lowvram)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", little)
    model = with_lora(make_flux())
    check(model, {TEXT + 16: TEXT}, prompt())
    assert any(partial)
    assert model.model.diffusion_model.single_blocks[1].linear1.weight_function


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("cast", DTYPES)
def test_fp8_weights(check, make_flux, cast):
    """Queries come in the dtype that is computed with, whatever the weights are stored in."""
    model = make_flux(dtype=torch.float8_e4m3fn, cast=cast)
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    reference = check(model, {TEXT + 16: TEXT}, prompt())
    assert {dtype for *_, dtype in reference.seen} == {cast}


def test_weights_that_are_dequantised_as_they_are_used(check, comfy, make_flux):
    """GGUF: another class of layers, whose weights are blocks of small integers until they run."""
    import comfy.ops

    class Quantised(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def quantise(self):
                scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
                numbers = (self.weight.detach() / scale).round().to(torch.int8)
                self.register_buffer("scale", scale)
                self.weight = torch.nn.Parameter(numbers, requires_grad=False)

            def forward(self, x):
                return torch.nn.functional.linear(x, self.weight.to(x) * self.scale.to(x), self.bias)

    model = make_flux(operations=Quantised)
    for layer in model.model.modules():
        if isinstance(layer, Quantised.Linear):
            layer.quantise()
    check(model, {TEXT + 16: TEXT}, prompt())


@pytest.fixture(scope="module")
def flux2(core, make_flux):
    """FLUX.2: shared modulation, four axes of 32, text positions, no pooled vector."""
    changes = {"image_model": "flux2", "in_channels": 32, "out_channels": 32, "axes_dim": [32] * 4}
    changes |= {"global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False}
    changes |= {"txt_ids_dims": [3], "theta": 2000, "vec_in_dim": None, "patch_size": 1}
    geometry = core.Geometry(1, 2, 2, 128)
    return make_flux(geometry, family="Flux2", **changes), core.Geometry(1, 2, 2, 128, "flux2")


FLUX2_TEXT = 512  # ComfyUI pads every prompt to it


def test_flux2(check, flux2, make_concept, pack):
    model, geometry = flux2
    found = importlib.import_module(f"{pack.__name__}.nodes.apply").flux_geometry(model)
    assert (found.family, found.describe()) == ("flux2", geometry.describe())
    noise = latent(4, 4, channels=32)
    check(model, {FLUX2_TEXT + 16: FLUX2_TEXT}, prompt(), noise=noise, concept=make_concept(geometry))


@pytest.mark.parametrize("method", [*METHODS, "index_timestep_zero"])
def test_tokens_of_reference_pictures_count_as_image_in_flux2(check, flux2, make_concept, method):
    model, geometry = flux2
    pictures = [latent(2, 3, channels=32), latent(5, 1, channels=32)]
    texts, positive = {FLUX2_TEXT + 16 + 6 + 5: FLUX2_TEXT}, referring(prompt(), pictures, method)
    check(model, texts, positive, noise=latent(4, 4, channels=32), concept=make_concept(geometry))


@pytest.mark.parametrize("order", ["cache first", "Apply first"])
def test_a_cache_of_reference_keys(apply, check, comfy, flux2, run, make_concept, order):
    """FluxKVCache: from the second step on there are more keys than queries."""
    from comfy_extras.nodes_flux import FluxKVCache

    def cached(model):
        return FluxKVCache.execute(model)[0]

    model, geometry = flux2
    few, many = FLUX2_TEXT + 16, FLUX2_TEXT + 16 + 6
    texts, positive = {many: FLUX2_TEXT, few: FLUX2_TEXT}, referring(prompt(), [latent(2, 3, channels=32)])
    case = {"noise": latent(4, 4, channels=32), "steps": 3}
    concept = make_concept(geometry)
    if order == "cache first":
        reference = check(cached(model), texts, positive, concept=concept, **case)
        assert {(q, k) for q, k, *_ in reference.seen} == {(many, many), (few, many)}
    else:
        check(model, texts, positive, node=cached, concept=concept, **case)
        after, before = cached(apply(model, [concept], 1.0)), apply(cached(model), [concept], 1.0)
        torch.testing.assert_close(run(after, positive, **case), run(before, positive, **case))


def test_a_concept_of_flux1_is_refused_for_flux2(apply, core, flux2, make_concept):
    """The same blocks and heads: nothing but the family tells them apart."""
    model, _ = flux2
    with pytest.raises(ValueError, match=r"was made for flux: 1 double .*but the model is flux2: 1 double"):
        apply(model, [make_concept(core.Geometry(1, 2, 2, 128))], 1.0)


def test_a_concept_of_flux2_is_refused_for_flux1(apply, core, flux, make_concept):
    with pytest.raises(ValueError, match=r"was made for flux2: 2 double .*but the model is flux: 2 double"):
        apply(flux, [make_concept(core.Geometry(2, 2, 2, 128, "flux2"))], 1.0)


def test_two_models_in_one_guider(apply, comfy, flux, make_flux, concept):
    """DualModelGuider runs the negative prompt on another model, with the first model's patches: both are protected."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    def sample(first, second):
        guider = DualModelGuider.execute(first, prompt(), 3.0, model_negative=second, negative=prompt(seed=1))[0]
        sigmas = torch.tensor([1.0, 0.6, 0.0])
        with torch.inference_mode():
            return guider.sample(
                latent(), torch.zeros(1, 16, 8, 8), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
            )

    second = make_flux(seed=1)
    protected = sample(apply(flux, [concept], 1.0), second)
    assert torch.equal(protected, sample(apply(flux, [concept], 1.0), apply(second, [concept], 1.0)))
    assert not torch.allclose(protected, sample(flux, second), atol=1e-2)


def on_two_devices(model, make_flux, monkeypatch):
    """`model` with a deep clone for a second device, as MultiGPUCFGSplitNode makes it. Both devices are the CPU."""
    import comfy.model_management
    import comfy.multigpu

    second = torch.device("cpu", 0)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **_: [CPU, second])
    model.cached_patcher_init = (make_flux, ())
    return comfy.multigpu.create_multigpu_deepclones(model, 2)


def test_several_gpus(apply, comfy, flux, make_flux, run, concept, monkeypatch):
    """Every device's thread runs a deep clone of the model, and all share one patch."""
    forwards = []
    model = make_flux()
    base = run(apply(model, [concept], 1.0), prompt(), prompt(LONG, seed=1), cfg=3.0)
    split = on_two_devices(apply(model, [concept], 1.0), make_flux, monkeypatch)
    patch = split.model_options["transformer_options"]["patches"]["attn1_patch"][0]
    around = type(patch).around_forward

    def noted(self, executor, *args, **kwargs):
        forwards.append((threading.get_ident(), id(executor.class_obj)))
        return around(self, executor, *args, **kwargs)

    monkeypatch.setattr(type(patch), "around_forward", noted)
    split = on_two_devices(apply(model, [concept], 1.0), make_flux, monkeypatch)
    torch.testing.assert_close(run(split, prompt(), prompt(LONG, seed=1), cfg=3.0), base)
    assert len({network for _, network in forwards}) == len({thread for thread, _ in forwards}) == 2
    assert not torch.allclose(base, run(model, prompt(), prompt(LONG, seed=1), cfg=3.0), atol=1e-2)


def test_samplers_in_two_threads_do_not_mix(apply, comfy, flux, make_flux, concept, run):
    """One Apply, protecting the first half of the steps: at any moment one thread is inside its half, one outside."""
    from comfy.patcher_extension import WrappersMP

    patched = apply(flux, [concept], 1.0, end_percent=0.5)
    models = [patched.clone(), make_flux().clone()]
    models[1].model_options = patched.clone().model_options  # another copy of the network, the same patch
    models[1].wrappers = patched.clone().wrappers
    expected = [run(models[i], prompt(seed=i), steps=4) for i in (0, 1)]
    turns, results = threading.Barrier(2, timeout=60), {}

    def alternating(executor, *args, **kwargs):
        turns.wait()
        return executor(*args, **kwargs)

    def work(i):
        results[i] = run(models[i], prompt(seed=i), steps=4)

    for model, kind in ((models[0], WrappersMP.APPLY_MODEL), (models[1], WrappersMP.APPLY_MODEL)):
        model.add_wrapper_with_key(kind, "turns", alternating)
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        torch.testing.assert_close(results[i], expected[i])


def test_two_samplers_of_one_apply_do_not_mix(apply, flux, run, concept):
    model = apply(flux, [concept], 1.0, end_percent=0.5)
    first = run(model, prompt(), steps=4)
    other = run(model, prompt(LONG, seed=1), noise=latent(6, 10), steps=3)
    assert torch.equal(run(model, prompt(), steps=4), first)
    assert torch.equal(run(model, prompt(LONG, seed=1), noise=latent(6, 10), steps=3), other)


def test_the_input_model_is_untouched(apply, flux, run, concept):
    before, weights = str(flux.model_options), {k: v.clone() for k, v in flux.model.state_dict().items()}
    wrappers = str(flux.wrappers)
    run(apply(flux, [concept], 1.0), prompt())
    assert (str(flux.model_options), str(flux.wrappers)) == (before, wrappers)
    assert all(torch.equal(value, weights[name]) for name, value in flux.model.state_dict().items())


def test_the_patch_is_never_moved_or_cast(apply, flux, concept):
    """ComfyUI calls `.to` on another list than it samples with, and with the weights' dtype, which may be fp8."""
    patch = apply(flux, [concept], 1.0).model_options["transformer_options"]["patches"]["attn1_patch"][0]
    assert not hasattr(patch, "to") and not hasattr(patch, "models")
