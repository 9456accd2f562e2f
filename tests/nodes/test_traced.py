"""Under torch.compile a protected block stays in the graph, and the audit sees every replay of it."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.host
TEXT, IMAGE = 5, 16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(comfy, monkeypatch):
    """PyTorch's attention: ComfyUI's own for CPUs reads the free memory, which breaks graphs."""
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention

    torch._dynamo.reset()
    attention = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def least(core, make_flux):
    """A model of one block of each kind: tracing takes most of the time here."""
    return make_flux(core.Geometry(1, 1, 2, 128))


@pytest.fixture(scope="module")
def make_least(core, make_concept):
    return lambda **changes: make_concept(core.Geometry(1, 1, 2, 128), **changes)


@pytest.fixture(scope="module")
def traced(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.traced")


def patches_of(model):
    return model.model_options["transformer_options"]["patches"]["attn1_patch"]


def block_of(model, patches):
    """The single block of ComfyUI's FLUX as the network calls it: a function of its tokens."""
    network = model.model.diffusion_model
    pe = network.pe_embedder(torch.zeros(1, TEXT + IMAGE, 3))
    options = {"patches": {"attn1_patch": patches}, "block_type": "single", "block_index": 0}
    options |= {"img_slice": [TEXT, TEXT + IMAGE]}
    return lambda x: network.single_blocks[0](x, vec=torch.ones(1, 256), pe=pe, transformer_options=options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("others", [0, 1, 2], ids=["alone", "two concepts", "behind another pack's"])
def test_a_protected_block_is_one_graph(apply, least, make_least, traced, backend, others):
    model = apply(least, [make_least()], 1.0)
    patches = patches_of(apply(model, [make_least(slug="heart", seed=1)], 1.0) if others == 1 else model)
    patches = [lambda q, k, *_, **__: {"q": 2 * q}, *patches] if others == 2 else patches
    block, bare = block_of(least, patches), block_of(least, [])
    x = torch.randn(1, TEXT + IMAGE, 256)
    with torch.inference_mode(), traced.chained([each for each in patches if hasattr(each, "protection")]):
        expected = block(x.clone())
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(x.clone()), expected)
        assert not torch.allclose(expected, bare(x.clone()), atol=1e-2)
        explained = torch._dynamo.explain(block)(x.clone())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_hook_that_leaves_the_graph_is_counted(least):
    """Control of the test above."""
    block = block_of(least, [torch.compiler.disable(lambda *_, **__: {})])
    with torch.inference_mode(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(block, fullgraph=True, backend="eager")(torch.randn(1, TEXT + IMAGE, 256))


def test_a_whole_network_is_one_graph_and_every_replay_is_seen(apply, compiled, least, make_least, sample):
    model = apply(least, [make_least()], 1.0)
    patch, expected, seen = patches_of(model)[0], sample(model, steps=3), []
    around = patch._run

    def noted(*args, **kwargs):
        out = around(*args, **kwargs)
        seen.append((patch._now.called, patch._now.projected))
        return out

    patch._run = noted
    torch.testing.assert_close(sample(compiled(model), steps=3), expected)
    assert seen == [(patch.protected, set())] * 3, "called in every block, in each step once, and by graphs alone"
    assert not torch.allclose(expected, sample(least, steps=3), atol=1e-2)


def test_a_graph_asks_the_patches_of_the_forward_that_runs_it(apply, least, make_least, traced):
    """No guard notices a new strength, or that the protection is gone: one graph turns as asked at each replay."""
    patches = [patches_of(apply(least, [make_least()], strength)) for strength in (1.0, 0.5)] + [[]]
    compiled = torch.compile(block_of(least, patches[0]), fullgraph=True, backend="eager")
    x, seen = torch.randn(1, TEXT + IMAGE, 256), []
    with torch.inference_mode():
        for each in patches:
            with traced.chained(each):
                seen.append(compiled(x.clone()))
                torch.testing.assert_close(seen[-1], block_of(least, each)(x.clone()))
    assert not any(torch.allclose(seen[i], seen[i - 1], atol=1e-3) for i in range(3))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_skipped_block_is_caught(apply, compiled, least, make_least, sample, fullgraph):
    """A block whose graph was traced with another forward in its place."""
    model = compiled(apply(least, [make_least()], 1.0), fullgraph)
    model.set_model_patch_replace(lambda args, _: {"img": args["img"]}, "dit", "single_block", 0)
    with pytest.raises(RuntimeError, match=r"in 1 of the 2 blocks.*\('single', 0\).*single_block 0, by \S*test_traced"):
        sample(model, steps=1)


def test_what_no_graph_can_do_does_not_answer(apply, least, make_least, traced):
    """A replayed graph meets a patch that only turns positive prompts: unanswered, the audit repeats the forward."""
    patch = patches_of(apply(least, [make_least()], 1.0, conditionings="positive only"))[0]
    open_patch = patches_of(apply(least, [make_least()], 1.0))[0]
    arguments = (0, "single", 0, TEXT, TEXT + IMAGE, True)
    for each, answered in ((patch, False), (open_patch, True)):
        q, k = torch.randn(2, 1, 2, TEXT + IMAGE, 128)
        before = q.clone()
        with traced.chained([each]):
            traced.turn(q, k, *arguments)
        assert (("single", 0) in each._now.called) == answered == (not torch.equal(q, before))
    with traced.chained([]):
        traced.turn(q, k, *arguments)  # a forward without protection turns nothing


def test_positive_prompts_alone_leave_the_graph(apply, compiled, least, make_least, sample):
    model = apply(least, [make_least()], 1.0, conditionings="positive only")
    torch.testing.assert_close(sample(compiled(model, fullgraph=False), steps=1), sample(model, steps=1))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="switch fullgraph off"):
        sample(compiled(model), steps=1)


def test_vectors_of_another_kind_are_refused_in_a_graph_too(apply, least, make_least, traced):
    patch = patches_of(apply(least, [make_least()], 1.0))[0]
    q = torch.randn(1, 2, 9, 128)
    for placed, text, total in ((False, 5, 9), (True, 5, 8), (True, 12, 9)):
        with traced.chained([patch]), pytest.raises(RuntimeError, match="Expected q and k before RoPE"):
            traced.turn(q.clone(), q.clone(), 0, "single", 0, text, total, placed)
