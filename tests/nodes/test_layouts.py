"""Right in every layout: protected samples equal those of a reference whose token spans the test works out by itself.

The reference is an attention patch of its own on the unprotected model. It knows the text's length from the prompt and
checks the number of tokens from the latent's size, where the node reads ComfyUI's `img_slice`. Every case also differs
from the unprotected model.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.support.layouts import CPU, LONG, METHODS, TEXT, image_tokens, latent, prompt, referring

pytestmark = pytest.mark.host


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
