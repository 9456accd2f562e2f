"""Shapes of workflows that people share, each with SafeRoPE Apply put in well, and left out of one way to a sampler.

A shape is the chain of nodes between the model and its samplers; `m` stands for the model that it is given: Apply's in
the protected form, the loader's in the other one.
"""

from __future__ import annotations

import pytest

from tests.support.workflows import node, protected
from workflow_lint.file import sorted_out
from workflow_lint.verdict import Required, audit_file

LOADED, SAFE = ("1", 0), ("3", 0)


def sampler(model, latent=("20", 0), **more):
    return node("KSampler", model=model, latent_image=latent, seed=1, denoise=1.0) | more


def row(*kinds, model="model"):
    """Nodes 30, 31, ... that each take the model of the one before, and a sampler behind them."""

    def shape(m):
        made = {}
        for key, kind in enumerate(kinds, 30):
            made[str(key)] = node(kind, **{model: m})
            m = (str(key), 0)
        return made | {"4": sampler(m)}

    return shape


def started(*kinds):
    """Latents that come from a row of nodes 20, 21, ... and one sampler."""

    def shape(m):
        made = {str(key): node(kind, samples=(str(key - 1), 0)) for key, kind in enumerate(kinds, 20)}
        return made | {"4": sampler(m, (str(19 + len(kinds)), 0))}

    return shape


def guided(kind, **inputs):
    return lambda m: {
        "30": node(kind, model=m, **inputs),
        "31": node("BasicScheduler", model=m, denoise=1.0),
        "4": node("SamplerCustomAdvanced", guider=("30", 0), sigmas=("31", 0)),
    }


def merged(kind):
    """The second model is protected always; the first is the one that is asked about."""
    return lambda m: {"30": node(kind, model1=m, model2=SAFE), "4": sampler(("30", 0))}


def second(*between):
    """A protected sampler, nodes on its latent, and another sampler with the model that is asked about."""

    def shape(m):
        made = {"4": sampler(SAFE)}
        at = ("4", 0)
        for key, kind in enumerate(between, 30):
            made[str(key)] = node(kind, samples=at)
            at = (str(key), 0)
        return made | {"40": sampler(m, at)}

    return shape


def previewed(m):
    return second()(m) | {"41": node("VAEDecode", samples=("40", 0)), "42": node("PreviewImage", images=("41", 0))}


def switched(m):
    return {"30": node("ComfySwitchNode", on_true=SAFE, on_false=m), "4": sampler(("30", 0))}


SHAPES = {
    "txt2img": row(),
    "img2img": started("VAEEncode"),
    "inpaint": started("VAEEncodeForInpaint", "SetLatentNoiseMask"),
    "inpaint model": started("InpaintModelConditioning"),
    "ControlNet": started("ControlNetApplyAdvanced"),
    "ControlNet union": started("SetUnionControlNetType", "ControlNetApplySD3"),
    "one LoRA": row("LoraLoader"),
    "chain of LoRAs": row("LoraLoader", "LoraLoaderModelOnly", "LoraLoader"),
    "hypernetwork": row("HypernetworkLoader"),
    "differential diffusion": row("DifferentialDiffusion"),
    "FreeU": row("FreeU_V2"),
    "sampling shift": row("ModelSamplingFlux"),
    "rescaled CFG": row("RescaleCFG"),
    "skipped layers": row("SkipLayerGuidanceDiT"),
    "step cache": row("EasyCache"),
    "compiled": row("TorchCompileModel"),
    "Kohya downscale": row("PatchModelAddDownscale"),
    "self attention guidance": row("SelfAttentionGuidance"),
    "video CFG": row("VideoLinearCFGGuidance"),
    "many patches": row("LoraLoader", "ModelSamplingFlux", "CFGNorm", "EasyCache"),
    "BasicGuider": guided("BasicGuider"),
    "CFGGuider": guided("CFGGuider"),
    "DualCFGGuider": guided("DualCFGGuider"),
    "PerpNegGuider": guided("PerpNegGuider"),
    "two models": guided("DualModelGuider", model_negative=SAFE),
    "SamplerCustom": lambda m: {"4": node("SamplerCustom", model=m)},
    "KSamplerAdvanced": lambda m: {"4": node("KSamplerAdvanced", model=m)},
    "merge": merged("ModelMergeSimple"),
    "merge of blocks": merged("ModelMergeBlocks"),
    "sum of models": merged("ModelMergeAdd"),
    "difference of models": merged("ModelMergeSubtract"),
    "FLUX merge": merged("ModelMergeFlux1"),
    "two samplers": second(),
    "hires fix": second("LatentUpscale"),
    "hires fix over pixels": second("VAEDecode", "ImageUpscaleWithModel", "VAEEncode"),
    "batch": second("RepeatLatentBatch"),
    "composite": second("LatentComposite"),
    "Kontext edit": second("VAEDecode", "FluxKontextImageScale", "VAEEncode", "ReferenceLatent"),
    "regional": started("ConditioningSetMask", "ConditioningCombine"),
    "style": started("StyleModelApply"),
    "video": started("WanImageToVideo"),
    "preview only": previewed,
    "switch": switched,
}
# Shapes that cannot be judged from the file: never "asks for protection", with Apply's model or without.
UNSEEN = {
    "easy pipe": row("easy pipeIn"),
    "Context": row("Context (rgthree)", model="base_ctx"),
    "Set and Get": row("SetNode", "GetNode"),
    "foreign switch": row("CR Model Input Switch", model="model1"),
    "foreign upscaler": lambda m: {"4": sampler(SAFE), "30": node("UltimateSDUpscale", model=m)},
}


def asks(shape, model):
    latents = {key: node("EmptySD3LatentImage") for key in ("19", "20")}
    verdict = audit_file(sorted_out(protected() | latents | shape(model)), Required(full=True))
    return verdict.protected, [reason for each in verdict.samplers for reason, _ in each.failures]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_asks_with_apply_and_does_not_without(name):
    assert asks(SHAPES[name], SAFE) == (True, [])
    safe, reasons = asks(SHAPES[name], LOADED)
    assert not safe and "a path without an Apply that acts in full" in reasons


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("model", [SAFE, LOADED], ids=["with", "without"])
def test_what_is_not_surely_understood_does_not_ask(name, model):
    assert not asks(UNSEEN[name], model)[0]


def test_there_are_forty_and_more():
    assert len(SHAPES) >= 40
