"""One Apply in many hands: two models, several devices, threads and samplers; nothing of one run reaches another."""

import threading

import pytest
import torch

from tests.support.layouts import CPU, LONG, latent, prompt

pytestmark = pytest.mark.host


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
