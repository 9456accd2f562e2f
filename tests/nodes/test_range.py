"""Which steps are protected, whatever sigmas a sampler asks for, and a word where none was."""

import importlib
import logging
from itertools import pairwise

import pytest
import torch

from tests.support.layouts import latent, prompt

pytestmark = pytest.mark.host

STEPS = 4  # euler, simple: they start at 0, 25, 50 and 75 % of the model's schedule
RESTED = "none of the steps of this run lies in the part"


@pytest.fixture
def patch_of():
    return lambda model: model.model_options["transformer_options"]["patches"]["attn1_patch"][-1]


@pytest.fixture
def sampled(comfy):
    """sampled(model, change) -> latents of STEPS Euler steps, the network asked at `change(sigma)` for every sigma."""
    import comfy.samplers

    def sample(model, change=lambda sigma: sigma, cfg=1.0, sigmas=None, guider=None):
        def lying(network, x, sigmas, extra_args=None, **kwargs):
            """Lying Sigma Sampler and Detail Daemon ask for other sigmas than those of the schedule."""
            for here, there in pairwise(sigmas):
                told = change(here) * x.new_ones([len(x)])
                denoised = network(x, told, **extra_args)
                x = x + (x - denoised) / here * (there - here)
            return x

        if guider is None:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(prompt(), prompt(seed=1))
            guider.set_cfg(cfg)
        if sigmas is None:
            sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
        with torch.inference_mode():
            start = torch.zeros(1, 16, 8, 8)
            return guider.sample(latent(), start, comfy.samplers.KSAMPLER(lying), sigmas, disable_pbar=True)

    return sample


@pytest.fixture
def acting(apply, flux, concept, sampled, patch_of, monkeypatch):
    """acting(start, end, change) -> for every forward of a run, whether the protection acted in it."""

    def ask(start, end, change=lambda sigma: sigma, **options):
        model, acted = apply(flux, [concept], 1.0, start_percent=start, end_percent=end), []
        in_range = type(patch_of(model))._in_range

        def noted(self, *args):
            acted.append(in_range(self, *args))
            return acted[-1]

        with monkeypatch.context() as patch:
            patch.setattr(type(patch_of(model)), "_in_range", noted)
            sampled(model, change, **options)
        return acted

    return ask


LIES = {
    "as scheduled": lambda sigma: sigma,
    "Lying Sigma, more": lambda sigma: sigma * 1.05,
    "Lying Sigma, less": lambda sigma: sigma * 0.95,
    "added": lambda sigma: sigma + 0.05,
    "below 0 in the last": lambda sigma: sigma if sigma > 0.6 else sigma - 0.6,
}


@pytest.mark.parametrize("lie", LIES)
def test_start_0_and_end_1_are_no_limits(acting, lie):
    """No first step is before the start, no last one behind the end."""
    assert acting(0.0, 0.7, LIES[lie])[:2] == [True, True]
    assert acting(0.3, 1.0, LIES[lie])[-1]


def test_other_starts_and_ends_are(acting):
    """The control: sigmas above 1 are before a start of 0.1, those below 0 behind an end of 0.9."""
    assert not acting(0.1, 0.7, LIES["added"])[0] and acting(0.1, 0.7, LIES["added"])[1]
    assert not acting(0.3, 0.9, LIES["below 0 in the last"])[-1]


@pytest.mark.parametrize("lie", LIES)
def test_halves_that_meet_share_no_step_and_leave_none(acting, lie):
    halves = [acting(0.0, 0.5, LIES[lie]), acting(0.5, 1.0, LIES[lie])]
    assert [a + b for a, b in zip(*halves, strict=True)] == [1] * STEPS


def test_multiplied_sigmas_keep_their_first_step(acting, comfy, flux):
    """Multiply Sigmas 1.1: the whole schedule is larger."""
    import comfy.samplers

    sigmas = 1.1 * comfy.samplers.calculate_sigmas(flux.get_model_object("model_sampling"), "simple", STEPS)
    assert sigmas[0] > 1
    assert acting(0.0, 0.7, sigmas=sigmas) == [True, True, True, False]


def test_a_lying_sampler_paints_what_is_protected(apply, flux, concept, sampled):
    """With an end of 0.99 every step is protected, as with 1; not one is lost to its sigma of 1.05."""
    lie = LIES["Lying Sigma, more"]
    whole, part = (sampled(apply(flux, [concept], 1.0, end_percent=end), lie) for end in (1.0, 0.99))
    assert torch.equal(whole, part)
    assert not torch.equal(part, sampled(apply(flux, [concept], 1.0, start_percent=0.1), lie)), "control"


def test_rows_of_different_sigmas_are_protected_where_one_is_in_the_range(apply, flux, concept, patch_of):
    patch = patch_of(apply(flux, [concept], 1.0, start_percent=0.2, end_percent=0.5))
    sampling = flux.get_model_object("model_sampling")
    inside, before, behind = (sampling.percent_to_sigma(p) for p in (0.3, 0.0, 0.9))
    for row in (before, behind):
        assert patch._in_range(sampling, torch.tensor([row, inside]))
        assert not patch._in_range(sampling, torch.tensor([row, row]))


@pytest.mark.parametrize(("percent", "level"), [(0.0, 1.2), (0.5, 0.5), (1.0, 0.0), (1.0, -1.0)])
def test_an_empty_range_acts_nowhere(pack, core, concept, tiny, flux, percent, level):
    attention = importlib.import_module(f"{pack.__name__}.nodes.host.patch").AttentionPatch
    patch = attention(core.Protection([concept], tiny), percent, percent)
    assert not patch._in_range(flux.get_model_object("model_sampling"), torch.tensor([level]))


def test_a_run_without_a_protected_step_is_told(apply, flux, run, concept, caplog):
    """Denoise 0.3 takes the last steps alone; an end of 0.5 is behind none of them."""
    model, start = apply(flux, [concept], 1.0, end_percent=0.5), latent(seed=4)
    with caplog.at_level(logging.WARNING):
        rested = run(model, prompt(), steps=STEPS, denoise=0.3, start=start)
    assert caplog.text.count(RESTED) == 1 and "(star)" in caplog.text and "end_percent" in caplog.text
    assert torch.equal(rested, run(flux, prompt(), steps=STEPS, denoise=0.3, start=start))


def test_a_run_with_one_is_not(apply, flux, run, concept, caplog):
    with caplog.at_level(logging.WARNING):
        acted = run(apply(flux, [concept], 1.0, end_percent=0.5), prompt(), steps=STEPS)
        run(apply(flux, [concept], 1.0), prompt(), steps=STEPS, denoise=0.3, start=latent(seed=4))
        run(apply(flux, [concept], 0.0), prompt(), steps=STEPS)
    assert "SafeRoPE" not in caplog.text
    assert not torch.equal(acted, run(flux, prompt(), steps=STEPS))


def test_a_run_without_a_protected_step_has_no_map_of_risk(node_classes, flux, run, concept):
    """Risk that nobody measured is not 0."""
    protect, show = node_classes["SafeRoPE_Apply"], node_classes["SafeRoPE_RiskMap"]
    model, recorder = protect.execute(flux, [concept], 1.0, end_percent=0.5).args
    rested = run(model, prompt(), steps=STEPS, denoise=0.3, start=latent(seed=4))
    with pytest.raises(ValueError, match="measured nothing in this run: none of its steps lay between"):
        show.execute(recorder, {"samples": rested})
    assert show.execute(recorder, {"samples": run(model, prompt(), steps=STEPS)}).args[0] > 0, "control"
