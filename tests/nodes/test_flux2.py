"""FLUX.2 has another geometry, padded prompts and a cache of keys: right there too, and never mixed up with FLUX.1."""

import importlib

import pytest
import torch

from tests.support.layouts import METHODS, latent, prompt, referring

pytestmark = pytest.mark.host


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
    found = importlib.import_module(f"{pack.__name__}.nodes.host.network").flux_geometry(model)
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
