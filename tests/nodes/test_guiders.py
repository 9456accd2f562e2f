"""`positive only` goes by the numbers that ComfyUI's usual guiders give to their prompts; under any other it is
refused.
"""

import importlib

import pytest
import torch

from tests.support.layouts import latent, prompt

pytestmark = pytest.mark.host

REFUSED = "set to conditionings = positive only, but this model is run by"


def usual(comfy, model):
    from comfy_extras import nodes_custom_sampler as nodes

    return {
        "CFGGuider": nodes.CFGGuider.execute(model, prompt(), prompt(seed=1), 3.0)[0],
        "Guider_Basic": nodes.BasicGuider.execute(model, prompt())[0],
    }


def unusual(comfy, model, cfg=1.0):
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler as nodes
    from comfy_extras.nodes_perpneg import PerpNegGuider

    class Reversed(comfy.samplers.CFGGuider):
        """Somebody's guider: the usual names, numbered the other way round, as `calc_cond_batch` allows."""

        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (ComfyUI's own signature)
            conds = [self.conds["negative"], self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[1]

    backwards = Reversed(model)
    backwards.set_conds(prompt(), prompt(seed=1))
    three = (prompt(), prompt(seed=2), prompt(seed=1))
    return {
        "Guider_DualCFG": nodes.DualCFGGuider.execute(model, *three, cfg, cfg, "regular")[0],
        "Guider_DualCFG nested": nodes.DualCFGGuider.execute(model, *three, cfg, cfg, "nested")[0],
        "Guider_PerpNeg": PerpNegGuider.execute(model, *three, 3.0, 1.0)[0],
        "Guider_DualModel": nodes.DualModelGuider.execute(model, prompt(), 3.0, model, prompt(seed=1))[0],
        "Reversed": backwards,
    }


NAMES = ["Guider_DualCFG", "Guider_DualCFG nested", "Guider_PerpNeg", "Guider_DualModel", "Reversed"]


@pytest.fixture
def guided(comfy):
    """guided(guider) -> latents of two Euler steps."""
    import comfy.samplers

    def sample(guider):
        with torch.inference_mode():
            euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.6, 0.0])
            return guider.sample(latent(), torch.zeros(1, 16, 8, 8), euler, sigmas, disable_pbar=True)

    return sample


@pytest.fixture
def positive_only(apply, flux, concept):
    return apply(flux, [concept], 1.0, conditionings="positive only")


@pytest.mark.parametrize("name", NAMES)
def test_positive_only_is_refused_where_prompts_are_numbered_otherwise(comfy, guided, positive_only, name):
    with pytest.raises(RuntimeError, match=rf"{REFUSED} {name.split()[0]}.*set conditionings to all"):
        guided(unusual(comfy, positive_only)[name])


@pytest.mark.parametrize("name", NAMES)
def test_all_is_protected_under_every_guider(comfy, guided, apply, flux, concept, name):
    protected = guided(unusual(comfy, apply(flux, [concept], 1.0))[name])
    assert not torch.allclose(protected, guided(unusual(comfy, flux)[name]), atol=1e-2)


@pytest.mark.parametrize("name", ["Guider_DualCFG", "Reversed"])
def test_it_would_be_unprotected_bit_for_bit(comfy, pack, guided, positive_only, flux, monkeypatch, name):
    """The control: without the refusal the negative prompt alone is turned, which
    a CFG of 1 leaves out of the picture."""
    patch = importlib.import_module(f"{pack.__name__}.nodes.host.patch")
    monkeypatch.setattr(patch, "require_usual", lambda guider: None)
    assert torch.equal(guided(unusual(comfy, positive_only)[name]), guided(unusual(comfy, flux)[name]))


@pytest.mark.parametrize("name", ["CFGGuider", "Guider_Basic"])
def test_positive_only_is_protected_under_the_usual_guiders(comfy, guided, positive_only, flux, name):
    assert not torch.allclose(guided(usual(comfy, positive_only)[name]), guided(usual(comfy, flux)[name]), atol=1e-2)


def test_positive_only_is_refused_where_a_node_calls_the_model_by_itself(comfy, positive_only):
    """Outside of a sampling run nobody says which prompt has which number, though the forward itself is protected."""
    import comfy.model_patcher
    import comfy.sampler_helpers
    import comfy.samplers

    conds = {name: comfy.sampler_helpers.convert_cond(prompt()) for name in ("negative", "positive")}
    options = comfy.model_patcher.create_model_options_clone(positive_only.model_options)
    comfy.sampler_helpers.prepare_model_patcher(positive_only, conds, options)
    base, conds, _ = comfy.sampler_helpers.prepare_sampling(positive_only, (1, 16, 8, 8), conds, options)
    conds = comfy.samplers.process_conds(base, latent(), conds, latent().device)
    positive_only.pre_run()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"{REFUSED} a node that calls the model by itself"):
        comfy.samplers.calc_cond_batch(base, list(conds.values()), latent(), torch.ones(1), options)
    positive_only.cleanup()


def split(apply_model, given):
    """A function wrapper that calls the model for one prompt after the other, as nodes for little memory do."""
    count = len(given["cond_or_uncond"])
    parts = {name: value.chunk(count) for name, value in given["c"].items() if torch.is_tensor(value)}
    rest = {name: value for name, value in given["c"].items() if name not in parts}
    rows = zip(given["input"].chunk(count), given["timestep"].chunk(count), strict=True)
    calls = [(x, t, {name: value[i] for name, value in parts.items()} | rest) for i, (x, t) in enumerate(rows)]
    return torch.cat([apply_model(x, t, **more) for x, t, more in calls])


@pytest.mark.parametrize("batch", [1, 2])
def test_positive_only_is_refused_where_prompts_are_taken_apart(apply, flux, concept, run, batch):
    """Two pictures of one prompt look like one picture of two prompts. All rows turned alike need no telling apart."""
    model = apply(flux, [concept], 1.0, conditionings="positive only")
    model.set_model_unet_function_wrapper(split)
    prompts, noise = (prompt(), prompt(seed=1)), latent(batch=batch)
    with pytest.raises(RuntimeError, match="another node takes the prompts apart"):
        run(model, *prompts, noise=noise, cfg=3.0)
    whole = apply(flux, [concept], 1.0)
    wrapped = whole.clone()
    wrapped.set_model_unet_function_wrapper(split)
    found, wanted = (run(each, *prompts, noise=noise, cfg=3.0) for each in (wrapped, whole))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def swapped(given):
    import comfy.samplers

    rows = given["model"], given["conds"][::-1], given["input"], given["sigma"], given["model_options"]
    return comfy.samplers._calc_cond_batch(*rows)[::-1]


def test_positive_only_is_refused_where_another_function_orders_the_prompts(comfy, guided, positive_only, flux):
    from comfy.patcher_extension import WrappersMP

    by_function, by_wrapper = positive_only.clone(), positive_only.clone()
    by_function.model_options["sampler_calc_cond_batch_function"] = swapped
    by_wrapper.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "other", lambda executor, *args: executor(*args))
    for model in (by_function, by_wrapper):
        with pytest.raises(RuntimeError, match=rf"{REFUSED} a function of .*test_guiders"):
            guided(usual(comfy, model)["CFGGuider"])
