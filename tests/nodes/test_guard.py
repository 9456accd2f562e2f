"""Whatever reaches the network of a protected model outside of a protected forward raises, and nothing else does.

The attackers are constructed after public packs: a sampler with a loop of its own over the network, one over its blocks
(XLabs, which also copies blocks whose weights are fp8), a guidance function with options of its own. Each is shown to
paint the unprotected picture, bit for bit, where the guard alone is left out.
"""

import copy
import gc
import importlib
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.layouts import CPU, latent, prompt

pytestmark = pytest.mark.host
SIGMAS = (1.0, 0.6, 0.0)
OUTSIDE = "outside of a protected forward"


def over_the_network(network, x, sigma, text, pooled):
    return network(x, sigma, text, pooled, torch.tensor([3.5]))


def over_the_blocks(network, x, sigma, text, pooled, block=lambda each: each):
    """ComfyUI's FLUX forward written anew, as XLabs' sampler does: the network itself is never called."""
    from comfy.ldm.flux.layers import timestep_embedding

    image, ids = network.process_img(x)
    vec = network.time_in(timestep_embedding(sigma, 256)) + network.vector_in(pooled)
    vec = vec + network.guidance_in(timestep_embedding(torch.tensor([3.5]), 256))
    image, text = network.img_in(image), network.txt_in(text)
    pe = network.pe_embedder(torch.cat((torch.zeros(1, text.shape[1], 3), ids), dim=1))
    for each in network.double_blocks:
        image, text = block(each)(img=image, txt=text, vec=vec, pe=pe)
    image = torch.cat((text, image), 1)
    for each in network.single_blocks:
        image = block(each)(image, vec=vec, pe=pe)
    image = network.final_layer(image[:, text.shape[1] :], vec)
    rows = x.shape[-2] // 2
    return image.view(1, rows, -1, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def over_copied_blocks(*args):
    return over_the_blocks(*args, block=copy.deepcopy)


def own_loop(model, forward=over_the_network):
    """A sampler with a loop of its own: it has ComfyUI load the model, and asks for nothing more."""
    import comfy.model_management

    comfy.model_management.load_model_gpu(model)
    x, ((text, extra),) = latent(), prompt()
    with torch.inference_mode():
        for now, then in itertools.pairwise(SIGMAS):
            velocity = forward(model.model.diffusion_model, x, torch.tensor([now]), text, extra["pooled_output"])
            x = x + (then - now) * velocity
    return x


@pytest.fixture
def own_pass(run):
    """own_pass(model) -> latents of a guidance node whose extra pass has model_options of its own and replaces the
    first.
    """
    import comfy.samplers

    def sample(model):
        def guidance(args):
            options = {"transformer_options": {}}
            return comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)[
                0
            ]

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(guidance, disable_cfg1_optimization=True)
        return run(clone, prompt())

    return sample


@pytest.fixture
def guarded(apply, flux, concept):
    return apply(flux, [concept], 1.0)


def unguarded(model):
    """The control: the same protected model, with everything but the guard."""
    clone = model.clone()
    clone.remove_injections("saferope")
    return clone


ATTACKS = [over_the_network, over_the_blocks, over_copied_blocks]


@pytest.mark.parametrize("forward", ATTACKS)
def test_a_loop_of_its_own_is_refused_and_named(guarded, flux, forward):
    with pytest.raises(RuntimeError, match=rf"SafeRoPE: over_\w+\(\) in \S*test_guard runs .*{OUTSIDE}.*KSampler"):
        own_loop(guarded, forward)
    assert torch.equal(own_loop(unguarded(guarded), forward), own_loop(flux, forward))


def test_who_writes_a_block_anew_is_refused_at_its_queries(guarded):
    import comfy.model_management

    comfy.model_management.load_model_gpu(guarded)
    network = guarded.model.diffusion_model
    for block in (*network.double_blocks, *network.single_blocks):
        with pytest.raises(RuntimeError, match=OUTSIDE):
            (block.linear1 if hasattr(block, "linear1") else block.img_attn.qkv)(torch.ones(1, 2, 256))
    network.txt_in(torch.ones(1, 2, 32))  # makes no picture: a node may ask for that


def test_the_attackers_paint(flux):
    """They are no straw men: on the unprotected model they make, up to rounding, what the network itself makes."""
    pictures = [own_loop(flux, forward) for forward in ATTACKS]
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0])
    assert pictures[0].isfinite().all() and not torch.equal(pictures[0], latent())


def test_a_pass_with_options_of_its_own_is_refused_and_named(guarded, flux, own_pass):
    with pytest.raises(RuntimeError, match=rf"SafeRoPE: guidance\(\) in \S*test_guard runs .*{OUTSIDE}.*model_options"):
        own_pass(guarded)
    assert torch.equal(own_pass(unguarded(guarded)), own_pass(flux))


def test_the_unprotected_clone_of_the_same_network_runs_as_ever(guarded, apply, flux, make_concept, run, own_pass):
    """Branches of one workflow share a network and take turns on it."""
    plain, looped, passed = run(flux, prompt()), own_loop(flux), own_pass(flux)
    for _ in range(2):
        protected = run(guarded, prompt())
        assert not torch.allclose(protected, plain, atol=1e-2)
        assert torch.equal(run(flux, prompt()), plain)
        with pytest.raises(RuntimeError, match=OUTSIDE):
            own_loop(guarded)
        assert torch.equal(own_loop(flux), looped)
        assert torch.equal(own_loop(flux.clone(), over_the_blocks), own_loop(flux, over_the_blocks))
        run(guarded, prompt())
        assert torch.equal(own_pass(flux), passed)


def test_a_second_model_that_alone_is_protected_is_refused(apply, comfy, flux, make_flux, concept):
    """Dual Model Guider runs it with the first one's options: until now unprotected, without a word."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    second = apply(make_flux(seed=1), [concept], 1.0)
    guider = DualModelGuider.execute(flux, prompt(), 3.0, model_negative=second, negative=prompt(seed=1))[0]
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=rf"comfy_extras.nodes_custom_sampler .*{OUTSIDE}"):
        guider.sample(latent(), torch.zeros(1, 16, 8, 8), sampler, torch.tensor(SIGMAS), disable_pbar=True)


def test_strength_0_is_unguarded(apply, flux, concept):
    assert torch.equal(own_loop(apply(flux, [concept], 0.0)), own_loop(flux))


def test_several_clones_and_chains_stay_guarded(guarded, apply, flux, make_concept, run):
    """Clones are told by ComfyUI that they are loaded; that, and their end, takes no guard off."""
    chained = apply(guarded, [make_concept(slug="heart", seed=1)], 1.0)
    other = apply(flux, [make_concept(slug="heart", seed=1)], 1.0)
    for model in (guarded, chained, other, guarded.clone().clone(), apply(guarded, [make_concept()], 0.0)):
        picture = run(model, prompt())
        model.clone()  # and gone again
        for forward in ATTACKS[:2]:
            with pytest.raises(RuntimeError, match=OUTSIDE):
                forward(model.model.diffusion_model, latent(), torch.ones(1), prompt()[0][0], torch.zeros(1, 16))
        assert torch.equal(run(model, prompt()), picture)


def test_a_protected_forward_of_another_model_or_thread_excuses_nothing(pack, guarded, make_flux):
    import comfy.model_management

    comfy.model_management.load_model_gpu(guarded)
    arguments = (guarded.model.diffusion_model, latent(), torch.ones(1), prompt()[0][0], torch.zeros(1, 16))
    with pack.nodes.host.guard.protected_forward(make_flux().model), pytest.raises(RuntimeError, match=OUTSIDE):
        over_the_blocks(*arguments)
    with pack.nodes.host.guard.protected_forward(guarded.model), ThreadPoolExecutor(1) as threads:
        over_the_blocks(*arguments)
        with pytest.raises(RuntimeError, match=OUTSIDE):
            threads.submit(over_the_blocks, *arguments).result()


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


def test_the_guard_goes_with_the_model(guarded, apply, flux, concept, run):
    import comfy.model_management

    free = own_loop(flux)
    run(guarded, prompt())
    assert hooks(flux) == 2 + 2 * 4, "the network, its last layer, four blocks and their layers"
    run(guarded.clone(), prompt())
    run(guarded, prompt())
    assert hooks(flux) == 2 + 2 * 4, "once, however often it is loaded"
    comfy.model_management.unload_all_models()
    assert not hooks(flux)
    run(guarded, prompt())
    run(flux, prompt())
    assert not hooks(flux)
    run(apply(flux, [concept], 1.0), prompt())
    gc.collect()
    assert not hooks(flux), "its node's output is gone"
    assert torch.equal(own_loop(flux), free)


def test_a_model_that_did_not_load_guards_nothing(guarded, flux, run, monkeypatch):
    """Out of memory: ComfyUI injects all the same, but does not count the model as loaded, and never ejects it."""
    plain = run(flux, prompt())
    with monkeypatch.context() as patch:
        patch.setattr(type(guarded), "load", lambda *args, **kwargs: 1 / 0)
        flux.model.model_loaded_weight_memory = 0
        with pytest.raises(ZeroDivisionError):
            run(guarded, prompt())
    assert hooks(flux), "nothing to be mistaken about"
    assert torch.equal(run(flux, prompt()), plain)


def test_a_guarded_model_is_freed_without_a_collection(apply, make_flux, concept, run):
    import comfy.model_management

    base = make_flux()
    model = apply(base, [concept], 1.0)
    run(model, prompt())
    network = weakref.ref(model.model.diffusion_model)
    comfy.model_management.unload_all_models()
    gc.disable()
    try:
        del base, model
        assert network() is None, "a reference cycle"
    finally:
        gc.enable()


def test_low_memory_is_guarded(apply, comfy, make_flux, concept, run, monkeypatch):
    """Parts that are loaded and unloaded on the way take the guard off and put it back."""
    import comfy.model_patcher

    load = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher, "load", lambda self, device=None, *a, **k: load(self, device, 1)
    )
    base = make_flux()
    model = apply(base, [concept], 1.0)
    run(model, prompt())
    assert base.model.model_lowvram
    for step in (lambda: None, lambda: model.partially_load(CPU, 1), lambda: model.partially_unload(CPU, 1)):
        step()
        with pytest.raises(RuntimeError, match=OUTSIDE):
            over_the_blocks(base.model.diffusion_model, latent(), torch.ones(1), prompt()[0][0], torch.zeros(1, 16))
    assert torch.equal(own_loop(base), own_loop(make_flux()))


def test_every_gpu_s_network_is_guarded(apply, comfy, make_flux, concept, run, monkeypatch):
    import comfy.model_management
    import comfy.multigpu

    second = torch.device("cpu", 0)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **_: [CPU, second])
    base = make_flux()
    base.cached_patcher_init = (make_flux, ())
    split = comfy.multigpu.create_multigpu_deepclones(apply(base, [concept], 1.0), 2)
    run(split, prompt(), prompt(seed=1), cfg=3.0)
    (clone,) = split.get_additional_models_with_key("multigpu")
    networks = [split.model.diffusion_model, clone.model.diffusion_model]
    assert networks[0] is not networks[1]
    for network in networks:
        with pytest.raises(RuntimeError, match=OUTSIDE):
            over_the_blocks(network, latent(), torch.ones(1), prompt()[0][0], torch.zeros(1, 16))


def test_checkpoints_are_computed_again_in_the_backward_pass(pack, guarded, monkeypatch):
    """Training on a protected model: what a checkpoint did not keep of a protected forward is no pass of one's own."""
    import comfy.model_management
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr(comfy.model_management, "in_training", True)
    comfy.model_management.load_model_gpu(guarded)
    network, calls = guarded.model.diffusion_model, []
    block, start = network.single_blocks[0], torch.ones(1, 21, 256, requires_grad=True)
    hook = block.linear1.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with pack.nodes.host.guard.protected_forward(guarded.model):
        pe = network.pe_embedder(torch.zeros(1, 21, 3))
        out = checkpoint(lambda x: block(x * 1, vec=torch.ones(1, 256), pe=pe), start, use_reentrant=False)
    out.sum().backward()
    hook.remove()
    assert len(calls) == 2 and start.grad.isfinite().all()
    with pytest.raises(RuntimeError, match=OUTSIDE):
        block(start * 1, vec=torch.ones(1, 256), pe=pe)


@pytest.mark.parametrize("plain_first", [False, True])
def test_a_compiled_block_is_guarded(apply, core, make_flux, make_concept, run, plain_first):
    """An object patch, as KJNodes sets it: its graph calls no hook inside,
    so the compiled module asks outside of it."""
    import comfy.model_management

    def one_block(model):
        comfy.model_management.load_model_gpu(model)
        network = model.model.diffusion_model
        with torch.inference_mode():
            pe = network.pe_embedder(torch.zeros(1, 21, 3))
            return network.single_blocks[0](torch.ones(1, 21, 256), vec=torch.ones(1, 256), pe=pe)

    torch._dynamo.reset()
    tiny, name = core.Geometry(1, 1, 2, 128), "diffusion_model.single_blocks.0"
    base, concept = make_flux(tiny), make_concept(tiny)
    compiled = base.clone()
    compiled.add_object_patch(name, torch.compile(base.get_model_object(name), backend="eager"))
    model = apply(compiled, [concept], 1.0)
    order = [(compiled, run(base, prompt())), (model, run(apply(base, [concept], 1.0), prompt()))]
    for each, expected in order if plain_first else order[::-1]:
        torch.testing.assert_close(run(each, prompt()), expected)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        one_block(model)
    for each, expected in order:
        torch.testing.assert_close(run(each, prompt()), expected)
    torch.testing.assert_close(one_block(unguarded(model)), one_block(base))
    torch._dynamo.reset()


def test_the_guard_breaks_no_graph(pack, guarded):
    """What is traced of it in a protected forward is nothing: a graph neither stops at it nor holds on to a model."""
    import comfy.model_management

    guard = importlib.import_module(f"{pack.__name__}.nodes.host.guard")

    comfy.model_management.load_model_gpu(guarded)
    layer = guarded.model.diffusion_model.single_blocks[0].linear1
    assert layer._forward_pre_hooks
    torch._dynamo.reset()
    with guard.protected_forward(guarded.model):
        traced = torch._dynamo.explain(lambda x: layer(x) + 1)(torch.ones(1, 2, 256))
    assert (traced.graph_count, traced.graph_break_count) == (1, 0)
    torch._dynamo.reset()


def over_the_compiled_network(network, *args):
    return over_the_network(torch.compile(network, backend="eager"), *args)


def over_the_network_compiled(network, *args):
    return torch.compile(over_the_network, backend="eager")(network, *args)


def over_the_blocks_compiled(network, *args):
    return torch.compile(over_the_blocks, backend="eager")(network, *args)


@pytest.mark.parametrize("forward", [over_the_compiled_network, over_the_network_compiled, over_the_blocks_compiled])
def test_a_loop_that_compiles_for_itself_is_refused(apply, core, make_flux, make_concept, forward):
    """Its graph is traced outside of a protected forward: the hooks inside refuse it while it is traced."""
    size = core.Geometry(1, 1, 2, 128)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=OUTSIDE):
        own_loop(apply(make_flux(size), [make_concept(size)], 1.0), forward)
    torch._dynamo.reset()


def test_a_clone_that_is_dropped_leaves_its_parent_guarded(flux, guarded, run):
    """ComfyUI makes the parent the loaded model when a clone is gone, and tells nobody."""
    import comfy.model_management

    def loaded_for_a_moment(model):
        clone = model.clone()
        comfy.model_management.load_model_gpu(clone)
        return clone.model.diffusion_model

    x, ((text, extra),) = latent(), prompt()
    for network in (loaded_for_a_moment(guarded), loaded_for_a_moment(guarded.clone())):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=OUTSIDE):
            over_the_network(network, x, torch.ones(1), text, extra["pooled_output"])
    plain = own_loop(flux)  # control: the unprotected clone runs, and as ever
    run(guarded, prompt())
    assert torch.equal(own_loop(flux), plain)
