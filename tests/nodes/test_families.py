"""Every family of models in the real ComfyUI: pictures equal those of a transcription that knows the spans."""

import importlib
import sys
from dataclasses import replace
from types import FunctionType

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from tests.support.comfy_models import TEXT, TINY, make_model
from tests.support.naive import NaiveCount, NaivePatch

pytestmark = pytest.mark.host

FAMILIES = list(TINY)
CLOSE = 1e-2  # of what protection changes: float32 through two steps of a network, against float64
BRIDGED = ("z-image", "lumina2", "sd3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def case(family):
    return TINY[family]


@pytest.fixture(scope="module")
def model(comfy, family):
    return make_model(family)


@pytest.fixture(scope="module")
def geometry(core, family, case):
    double, single, heads, head_dim, keys = case.geometry
    return core.Geometry(double, single, heads, head_dim, family, keys)


@pytest.fixture(scope="module")
def concept(make_concept, geometry):
    return make_concept(geometry)


@pytest.fixture
def same(apply, run, model, concept, reference):
    """same(texts, positive, ...): protected pictures are the reference's, and others than the unprotected model's."""

    def compare(texts, *args, **kwargs):
        naive = NaivePatch(concept, texts)
        protected = run(apply(model, [concept], 1.0), *args, **kwargs)
        plain = run(model, *args, **kwargs)
        expected = reference(naive, *args, **kwargs)
        assert expected.isfinite().all() and len(naive.seen) == concept.geometry.blocks
        change = (expected - plain).norm()
        assert change > 1e-3 * plain.norm(), "nothing to tell them apart by"
        assert (protected - expected).norm() < CLOSE * change
        return naive

    return compare


@pytest.fixture
def reference(monkeypatch, run, model, family):
    """reference(naive, ...) -> what the model samples with the transcription in its attention."""

    def sample(naive, *args, **kwargs):
        expected = model.clone()
        if family == "sd3":
            expected.model_options["transformer_options"] = {"optimized_attention_override": _in_sd3(naive)}
        elif family in BRIDGED:
            _in_lumina(monkeypatch, expected.model.diffusion_model, naive)
        else:
            expected.set_model_attn1_patch(naive)
        result = run(expected, *args, **kwargs)
        monkeypatch.undo()
        return result

    return sample


def _in_lumina(monkeypatch, network, naive):
    """The attention of ComfyUI's NextDiT written out, in the place of its own, fused one."""
    from comfy.ldm.lumina.model import JointAttention

    numbers = {id(layer.attention): index for index, layer in enumerate(network.layers)}

    def forward(self, x, mask, positions, transformer_options=None):
        heads = self.n_local_heads, self.n_local_kv_heads, self.n_local_kv_heads
        parts = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(heads, dim=1)
        q, k = (
            rms_norm(part, (self.head_dim,), norm.weight, norm.eps or torch.finfo(torch.float32).eps)
            for part, norm in zip(parts, (self.q_norm, self.k_norm), strict=False)
        )
        if id(self) in numbers:
            q, k = naive.turned(q, k, "single", numbers[id(self)])
        matrices = positions.movedim(1, 2)
        q, k = ((matrices @ part.unflatten(-1, (-1, 2))[..., None]).flatten(-3) for part in (q, k))
        out = scaled_dot_product_attention(q, k, parts[2], enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))

    monkeypatch.setattr(JointAttention, "forward", forward)


def _in_sd3(naive):
    """Blocks by the order of their calls; the second attention of image tokens alone is none of a block's own."""
    called = []

    def override(attention, q, k, v, heads, **kwargs):
        if q.shape[1] in naive.texts:
            index = len(called) % naive.concept.geometry.double_blocks
            called.append(index)
            whole = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
            q, k = (x.transpose(1, 2).flatten(2) for x in naive.turned(*whole, "double", index))
        return attention(q, k, v, heads, **kwargs)

    return override


def test_the_table_is_what_is_tested(core):
    assert set(core.FAMILIES) - {"flux3"} == set(FAMILIES), "ComfyUI's class of FLUX.3 is not known yet"
    for name, family in ((name, core.FAMILIES[name]) for name in FAMILIES):
        double, single, *_ = TINY[name].geometry
        assert (family.double, family.single) == (double > 0, single > 0)
        assert family.known is None or (family.known.family == name and family.known.group == _group(name))


def _group(name):
    _, _, heads, _, keys = TINY[name].geometry
    return {"krea2": 4, "lumina2": 3}.get(name, heads // keys)  # case ones share by two


def test_a_network_is_known_by_its_class_and_sizes(pack, model, geometry):
    found = importlib.import_module(f"{pack.__name__}.nodes.host.network").flux_geometry(model)
    assert found == geometry


def test_a_network_that_is_not_whole_is_refused(pack, comfy, family):
    """As it is where another node has put a block of its own in the place of the first."""
    families = importlib.import_module(f"{pack.__name__}.nodes.host.families")
    network = make_model(family).model.diffusion_model
    blocks = next(iter(families.layout_of(network).blocks.values()))[0]
    getattr(network, blocks)[0] = torch.nn.Identity()
    if families.layout_of(network).heads is not families._as_flux:  # which the network itself tells
        with pytest.raises(ValueError, match="whose attention it does not reach"):
            families.geometry_of(network)
    assert next(iter(families.parts(network))).queries is None


def test_pictures_of_a_prompt(same, case):
    same({case.text + case.image: case.text}, case.prompt(), noise=case.latent())


def test_batches_with_a_negative_prompt(same, case):
    same({case.text + case.image: case.text}, case.prompt(), case.prompt(seed=1), noise=case.latent(batch=2), cfg=3.0)


@pytest.mark.parametrize("family", [name for name in FAMILIES if TINY[name].mask], indirect=True)
def test_masked_text(same, run, model, case):
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, -2:] = 0
    masked = case.prompt(attention_mask=mask)
    same({case.text + case.image: case.text}, masked, noise=case.latent())
    pictures = [run(model, positive, noise=case.latent()) for positive in (masked, case.prompt())]
    assert not torch.allclose(*pictures), "the mask was to matter"


@pytest.mark.parametrize("family", [name for name in FAMILIES if TINY[name].references], indirect=True)
def test_reference_pictures_count_as_image(same, case):
    pictures = [case.latent(side=case.side // 2)]
    positive = case.prompt(reference_latents=pictures, reference_latents_method="index")
    same({case.text + case.image + case.references: case.text}, positive, noise=case.latent())


def test_another_span_would_show(apply, run, model, concept, reference, case):
    """Control: a transcription that takes the last token of text for one of the picture makes another picture."""
    how = {"positive": case.prompt(), "noise": case.latent()}
    wrong = reference(NaivePatch(concept, {case.text + case.image: case.text - 1}), **how)
    protected, plain = run(apply(model, [concept], 1.0), **how), run(model, **how)
    assert (wrong - protected).norm() > CLOSE * (protected - plain).norm()


def test_risk_is_the_share_of_gates_that_pass(node_classes, make_concept, geometry, reference, model, case):
    """Risk Probe's one pass is at the highest sigma, as a sampling of one step is."""
    concept = make_concept(geometry, threshold=5 / geometry.head_dim)  # random vectors have 4 / D on average
    start = {"samples": torch.zeros_like(case.latent())}
    probed = node_classes["SafeRoPE_RiskProbe"].execute(model, [concept], case.prompt(), 0.4, "report", latent=start)
    count = NaiveCount(concept, {case.text + case.image: case.text})
    reference(count, case.prompt(), noise=_noise(start["samples"]), steps=1)
    assert 0 < count.risk < 1 and probed.args[0] == pytest.approx(count.risk, abs=1e-6)


def _noise(start):
    import comfy.sample

    return comfy.sample.prepare_noise(start, 0)


def test_risk_map_follows_the_picture(node_classes, apply, run, model, concept, case):
    protected, recorder = node_classes["SafeRoPE_Apply"].execute(model, [concept], 1.0).args
    samples = run(protected, case.prompt(), noise=case.latent())
    report = node_classes["SafeRoPE_RiskMap"].execute(recorder, {"samples": samples}).args
    assert any("risk 1.00" in str(each) for each in report), report


def test_strength_zero_is_the_unprotected_model(apply, run, model, concept, case):
    how = {"positive": case.prompt(), "noise": case.latent()}
    assert torch.equal(run(apply(model, [concept], 0.0), **how), run(model, **how))


def test_gates_above_all_tokens_leave_every_bit(apply, run, model, make_concept, geometry, case):
    """A token that does not turn comes back as it was, whatever way it took."""
    closed = make_concept(geometry, threshold=0.99)
    how = {"positive": case.prompt(), "noise": case.latent()}
    assert torch.equal(run(apply(model, [closed], 1.0), **how), run(model, **how))


def test_concepts_of_other_families_are_refused(apply, core, model, make_concept, geometry):
    """Of the same blocks and heads: the family alone tells, in both directions."""
    for other in FAMILIES:
        if other != geometry.family:
            with pytest.raises(ValueError, match=rf"made for {other}: .*but the model is {geometry.family}: "):
                apply(model, [make_concept(replace(geometry, family=other))], 1.0)


def test_a_block_that_loses_its_hook_is_an_error(apply, run, model, concept, case, pack, monkeypatch):
    """Fail closed: the audit of the forward sees queries that never came by."""
    part = list(importlib.import_module(f"{pack.__name__}.nodes.host.families").parts(model.model.diffusion_model))[-1]
    protected = apply(model, [concept], 1.0)
    patches = importlib.import_module(f"{pack.__name__}.nodes.host.patch")
    own = patches.AttentionPatch.__call__

    def deaf(self, *args, extra_options=None, **kwargs):
        if extra_options["block_index"] == part.number and extra_options["block_type"] == part.kind:
            return {}
        return own(self, *args, extra_options=extra_options, **kwargs)

    monkeypatch.setattr(patches.AttentionPatch, "__call__", deaf)
    with pytest.raises(RuntimeError, match=r"was called in .* blocks it protects"):
        run(protected, case.prompt(), noise=case.latent())


@pytest.mark.parametrize("family", BRIDGED, indirect=True)
def test_a_compiled_model_without_the_hook_is_an_error(apply, run, model, concept, case):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    (compiled,) = TorchCompileModel.execute(model, "inductor").result
    with pytest.raises(RuntimeError, match=r"compiled .* shows neither its queries nor its keys"):
        run(apply(compiled, [concept], 1.0), case.prompt(), noise=case.latent())


@pytest.mark.parametrize("family", BRIDGED, indirect=True)
def test_two_nodes_in_a_row_both_act(apply, run, model, make_concept, geometry, case):
    """Concepts in heads of their own, whose key heads are apart: one node with both is the same."""
    first = make_concept(geometry)
    rows = first.heads.clone()
    rows[:, 2] = geometry.heads - 1
    second = make_concept(geometry, slug="moon", seed=1, heads=rows)
    how = {"positive": case.prompt(), "noise": case.latent()}
    chain, both = apply(apply(model, [first], 1.0), [second], 1.0), apply(model, [first, second], 1.0)
    chained, one, alone = (run(each, **how) for each in (chain, both, apply(model, [second], 1.0)))
    torch.testing.assert_close(chained, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(chained, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", BRIDGED, indirect=True)
def test_positive_prompts_alone(apply, run, model, concept, case):
    how = {"positive": case.prompt(), "negative": case.prompt(seed=1), "noise": case.latent(), "cfg": 3.0}
    some = apply(model, [concept], 1.0, conditionings="positive only")
    pictures = [run(each, **how) for each in (some, apply(model, [concept], 1.0), model)]
    assert not any(torch.equal(pictures[0], other) for other in pictures[1:])


def test_a_function_in_the_place_of_the_network_s_is_named(core, pack, model, monkeypatch):
    """Of its own module, of a class of its blocks, and of what all families share."""
    import comfy.ldm.modules.attention
    import comfy.samplers

    strangers = importlib.import_module(f"{pack.__name__}.nodes.host.strangers").strangers
    guider, sampler = comfy.samplers.CFGGuider(model), comfy.samplers.ksampler("euler")
    assert strangers(guider, sampler, [], []) == [], "control"
    network = model.model.diffusion_model
    layers = {type(each) for each in network.modules() if type(each).__module__.startswith("comfy.ldm.")}
    own = [(kind, "forward") for kind in layers if "forward" in vars(kind)]
    written = {sys.modules[kind.__module__] for kind in layers}
    own += [(home, name) for home in written for name, value in vars(home).items() if isinstance(value, FunctionType)]
    assert sys.modules[type(network).__module__] in written
    for holder, name in (*own, (comfy.ldm.modules.attention, "optimized_attention")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, lambda *args, **more: None)
            assert __name__ in strangers(guider, sampler, [], []), (holder, name)
