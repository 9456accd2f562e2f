"""The baselines: their formulas against naive ones, strength 0 is the model itself, everything that is hung in comes
off.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from saferope_benchmark.baselines import (
    BASELINES,
    adavd,
    des,
    erase_anything,
    esd,
    gem,
    lora,
    nag,
    oce,
    rand,
    safree,
    sld,
    uce,
)
from saferope_benchmark.baselines.task import task_of
from saferope_benchmark.baselines.teacher import erased, erasing_lessons, trajectories
from saferope_benchmark.sample import sample
from saferope_training.flux.identity import fingerprint
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode, seeded_noise, velocity
from saferope_training.prompts import tiny_world_prompts
from saferope_training.stages import save_tensors

TRAINED = (esd, erase_anything, des, gem)
TEXTS = ["a red star in the center on a white background", "a blue ring in the top on a black background"]


@pytest.fixture
def few(monkeypatch, settings):
    """Every method with so few steps and prompts that a fit takes a moment."""
    for module in TRAINED:
        monkeypatch.setattr(module, "STEPS", 4)
        monkeypatch.setattr(module, "BATCH", 4)
    for module in (esd, erase_anything, gem):
        monkeypatch.setattr(module, "PROMPTS", 4)
    monkeypatch.setattr(rand, "Settings", lambda **_: replace(settings, generator="random"))


@pytest.fixture
def quick(model):
    return replace(model, steps=2)


@pytest.fixture
def task():
    return task_of(tiny_world_prompts("star", unsafe=8, benign=8, seed=0))


def painted(model):
    return sample(model, TEXTS, [0, 1])


def hooks(model):
    """How many hooks hang on the pipeline's modules."""
    modules = [m for part in (model.transformer, model.pipe.text_encoder_2) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize("name", BASELINES)
def test_method_changes_pictures_and_leaves_nothing_behind(name, quick, task, few, tmp_path):
    method, base, weights = BASELINES[name], painted(quick), fingerprint(quick.transformer)
    text_weights = fingerprint(quick.pipe.text_encoder_2)
    state = method.fit(quick, task, seed=0)
    assert all(tensor.is_contiguous() for tensor in state.values()), "as from the file, or products round otherwise"
    save_tensors(tmp_path / "state.safetensors", state)
    # copied to where tensors lie in memory: products of what begins anywhere in a file may round otherwise, too
    kept = {name: tensor.clone() for name, tensor in load_file(tmp_path / "state.safetensors").items()}
    strength = max(method.STRENGTHS)
    with method.applied(quick, state, strength):
        changed = painted(quick)
    with method.applied(quick, kept, strength):
        assert torch.equal(painted(quick), changed)
    assert not torch.equal(changed, base), "the method does nothing"
    with pytest.raises(KeyError), method.applied(quick, state, strength):
        raise KeyError
    for nothing in ((state, 0.0), ({}, strength)):
        with method.applied(quick, *nothing):
            assert torch.equal(painted(quick), base)
    assert torch.equal(painted(quick), base)
    assert hooks(quick) == 0 and quick.edits == []
    assert (fingerprint(quick.transformer), fingerprint(quick.pipe.text_encoder_2)) == (weights, text_weights)


def test_random_generators_turn_as_far_as_they_are_told_to(quick, task, few):
    """A protection's strength ends at half a turn; this strength is part of the generators."""
    state, pictures = rand.fit(quick, task, seed=0), []
    for strength in (1.0, 1.5, 2.0):
        with rand.applied(quick, state, strength):
            pictures.append(painted(quick))
    assert not any(torch.equal(one, other) for one, other in combinations(pictures, 2))


@pytest.mark.parametrize("name", BASELINES)
def test_default_lies_within_the_search(name):
    strengths = BASELINES[name].STRENGTHS
    assert len(strengths) >= 3 and list(strengths) == sorted(strengths) and strengths[0] > 0


def test_same_seed_gives_the_same_weights(quick, task, few):
    first, again, other = (esd.fit(quick, task, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", TRAINED)
def test_short_fit_moves_unsafe_velocities_most(method, task, monkeypatch):
    """On the embedded model; benign prompts are the control."""
    for name, value in (("STEPS", 30 if method is des else 10), ("BATCH", 4), ("PROMPTS", 4)):
        monkeypatch.setattr(method, name, value, raising=False)
    model = replace(load_model("tinyworld"), steps=4)
    test = task_of(tiny_world_prompts("star", unsafe=6, benign=6, seed=5))
    x, t = seeded_noise(model, range(6)), torch.full((6,), 0.95)

    def asked(side):
        return velocity(model, x, t, encode(model, [record.text for record in side]), autocast=False)

    state = method.fit(model, task, 0)
    with torch.no_grad():
        before = [asked(side) for side in (test.unsafe, test.benign)]
        with method.applied(model, state, 1.0):
            after = [asked(side) for side in (test.unsafe, test.benign)]
    unsafe, benign = ((a - b).square().mean().item() for a, b in zip(after, before, strict=True))
    assert unsafe > 1.2 * benign


def test_esd_target_is_the_empty_prompt_at_eta_one():
    concept, empty = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.allclose(erased(concept, empty, 1.0), empty)
    assert torch.equal(erased(concept, empty, 0.0), concept)
    assert torch.allclose(erased(concept, empty, 3.0) - empty, -2 * (concept - empty), atol=1e-6)


def test_lessons_are_the_frozen_models_own(quick):
    """States lie on the pipeline's trajectory, and the last one leads to its picture; targets are of those states."""
    lessons = erasing_lessons(quick, TEXTS, seed=0, eta=1.0, guidance=1.0)
    times, met, end = trajectories(quick, encode(quick, TEXTS), [0, 1])
    assert torch.equal(lessons.latents, met.flatten(0, 1)) and times[0] == 1
    assert torch.equal(met[0], seeded_noise(quick, [0, 1]))
    some = replace(quick, guidance=1.0), lessons.latents[:1], lessons.times[:1]
    assert torch.allclose(velocity(*some, encode(quick, [""]), autocast=False), lessons.targets[:1], atol=1e-4)
    last = velocity(quick, met[-1], times[-1:].expand(2), encode(quick, TEXTS), autocast=False)
    assert torch.allclose(met[-1] - times[-1] * last, end, atol=1e-3)


def test_lora_is_found_by_diffusers_own_loader(quick, task, few):
    state = esd.fit(quick, task, seed=0)
    with esd.applied(quick, state, 1.0):
        ours = painted(quick)
    quick.pipe.load_lora_weights(dict(state))
    theirs = painted(quick)
    quick.pipe.unload_lora_weights()
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(painted(quick), theirs, atol=1e-5)


def test_erase_anything_learns_queries_and_keys_of_text():
    names = [f"transformer_blocks.3.attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_q")]
    import re

    assert [bool(re.fullmatch(erase_anything.TARGETS, name)) for name in names] == [True, True, False, False]


def test_attention_maps_are_the_ones_of_attention(quick, monkeypatch):
    """All text tokens marked, a map is the whole attention on text, as diffusers' own attention sees it."""
    marked = torch.ones(2, quick.text_length, dtype=torch.bool)
    asked = seeded_noise(quick, [0, 1]), torch.tensor([0.9, 0.9]), encode(quick, TEXTS)
    seen = []
    from diffusers.models.transformers import transformer_flux

    real = transformer_flux.dispatch_attention_fn

    def watching(query, key, value, **options):
        seen.append(torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5)
        return real(query, key, value, **options)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", watching)
    maps = erase_anything._with_maps(quick, asked, marked)[1]
    expected = seen[0].softmax(-1)[:, :, quick.text_length :, : quick.text_length].sum(-1).mean(1)
    assert torch.allclose(maps, expected, atol=1e-5) and maps.max() < 1
    one = erase_anything._with_maps(quick, asked, marked & (torch.arange(quick.text_length) == 2))[1]
    assert (one < maps).all()


def test_contrast_falls_when_maps_go_to_the_irrelevant():
    synonym, irrelevant = torch.eye(4)[0], torch.eye(4)[1:]
    far, near = (erase_anything.reverse_info_nce(x, synonym, irrelevant) for x in (synonym, irrelevant[0]))
    assert 0 <= near < 1e-5 and far > 10


def test_uce_minimises_its_objective(quick, task):
    state = uce.fit(quick, task, seed=0)
    layer, scale = quick.transformer.context_embedder, 2.0
    concept, kept, shift = (state[f"t5.{part}"].double() for part in ("concept", "kept", "shift"))
    weight = layer.weight.detach().double()
    targets = concept @ weight.T + shift
    edited = weight + shift.T @ uce.edit_factor(concept, kept, scale).double()

    def objective(w):
        erased = scale * (concept @ w.T - targets).square().sum()
        return erased + (kept @ (w - weight).T).square().sum() + uce.RIDGE * (w - weight).square().sum()

    gradient = torch.func.grad(objective)
    assert gradient(edited).abs().max() < 1e-4 * gradient(weight).abs().max()
    assert objective(edited) < objective(weight)


def test_uce_targets_have_no_bias(quick, task):
    """With the anchor's own embedding, the edited layer gives what the base gives, bias included once."""
    state, layer = uce.fit(quick, task, seed=0), quick.transformer.context_embedder
    torch.nn.init.constant_(layer.bias, 3.0)
    again = uce.fit(quick, task, seed=0)
    assert torch.allclose(state["t5.shift"], again["t5.shift"], atol=1e-5)
    empty = encode(quick, [""]).states[:, 0]
    with uce.applied(quick, {**again, "t5.kept": again["t5.kept"][:0]}, 1e6):
        moved = layer(again["t5.concept"][:1])
    assert torch.allclose(moved, layer(empty), atol=0.02)
    assert not torch.allclose(layer(again["t5.concept"][:1]), layer(empty), atol=0.02)


def test_sld_is_the_formula_step_by_step(monkeypatch):
    monkeypatch.setattr(sld, "THRESHOLD", 0.3)
    guide, draw = sld.SafetyGuidance(scale=1.5, warm_up=1), torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 1, 2, 2, generator=draw) for _ in range(3)]
    momentum = [0.0] * 4
    for number, (velocities, t) in enumerate(zip(steps, (1.0, 0.7, 0.3), strict=True)):
        got = guide.combine(velocities, torch.tensor([t])).flatten().tolist()
        rows = zip(*(v.flatten().tolist() for v in velocities), strict=True)
        for place, (prompt, empty, unsafe) in enumerate(rows):
            scale = min(1.0, 1.5 * abs(prompt - unsafe)) if prompt - unsafe < 0.3 else 0.0
            gamma = scale * (unsafe - empty) + sld.MOMENTUM_SCALE * momentum[place]
            momentum[place] = sld.MOMENTUM * momentum[place] + (1 - sld.MOMENTUM) * gamma
            assert got[place] == pytest.approx(prompt - gamma if number else prompt, abs=1e-5)


def test_sld_begins_anew_with_every_run():
    guide, velocities = sld.SafetyGuidance(5.0, 0), torch.randn(3, 1, 2, 2)
    first, second = (guide.combine(velocities, torch.tensor([t])) for t in (1.0, 0.5))
    assert not torch.equal(first, second)
    assert torch.equal(guide.combine(velocities, torch.tensor([1.0])), first)


def test_nag_is_bounded_and_leaves_equals_alone():
    plus, minus = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    guided = nag.normalised_guidance(plus, minus, 50.0)
    bound = nag.BLEND * nag.LARGEST_RATIO + 1 - nag.BLEND
    l1 = [x.abs().sum(-1) for x in (guided, plus)]
    assert (l1[0] <= bound * l1[1] * (1 + 1e-5)).all()
    unbounded = nag.BLEND * (50 * plus - 49 * minus) + (1 - nag.BLEND) * plus
    assert (unbounded.abs().sum(-1) > bound * l1[1]).all(), "nothing to bound"
    assert torch.allclose(nag.normalised_guidance(plus, plus, 50.0), plus, atol=1e-5)
    assert torch.allclose(nag.normalised_guidance(plus, minus, 1.0), plus, atol=1e-6)


def test_nag_with_the_prompt_as_negative_changes_nothing(quick):
    text = encode(quick, TEXTS[:1])
    base = sample(quick, TEXTS[:1], [0])
    with nag.applied(quick, {"states": text.states, "pooled": text.pooled}, 4.0):
        assert torch.allclose(sample(quick, TEXTS[:1], [0]), base, atol=1e-3)


def test_safree_projection_removes_the_concept_and_holds():
    draw = torch.Generator().manual_seed(0)
    basis, without, tokens = (torch.randn(n, 16, generator=draw) for n in (2, 5, 7))
    basis = safree.span_of(basis)
    moved = safree.projected(tokens, without, basis)
    assert (moved @ basis).abs().max() < 1e-5 < (tokens @ basis).abs().max()
    assert torch.allclose(safree.outside(moved, basis), moved, atol=1e-6)
    inside = safree.span_of(torch.cat([without, basis.T]))
    assert torch.allclose(moved @ inside @ inside.T, moved, atol=1e-5)


def test_safree_triggers_are_tokens_whose_loss_leaves_the_concept():
    basis, without = torch.eye(4)[:, :1], torch.eye(4)[[0, 0, 1]] + 0.1
    expected = []
    distance = [row[1:].norm().item() for row in without]
    for i, own in enumerate(distance):
        others = [d for j, d in enumerate(distance) if j != i]
        expected.append(own > (1 + safree.MARGIN) * sum(others) / len(others))
    assert safree.triggers(without, basis).tolist() == expected == [False, False, True]


def test_des_losses_are_the_papers(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    safe, safe0, unsafe, far0 = torch.randn(4, 3, 8, generator=draw)
    word, empty0, kd = (torch.randn(n, 8, generator=draw) for n in (1, 1, 1))
    got = des.des_losses(safe, safe0, unsafe, far0, word, empty0, kd[0])

    def away(a, b):
        return sum(1 - (x @ y / (x.norm() * y.norm())).item() for x, y in zip(a, b, strict=True)) / len(a)

    share = des.SAFE_WEIGHT
    expected = (
        share * (away(safe, safe0) + away(safe + kd, safe0)),
        (1 - share) * away(unsafe, far0 - kd),
        (1 - share) * away(word, empty0),
    )
    assert [x.item() for x in got] == pytest.approx(expected, abs=1e-5)


def test_des_reads_the_concept_as_the_empty_prompt(quick, task, monkeypatch):
    monkeypatch.setattr(des, "STEPS", 12)
    empty = encode(quick, [""]).states.flatten()
    before = encode(quick, ["star"]).states.flatten()
    with des.applied(quick, des.fit(quick, task, seed=0), 1.0):
        after = encode(quick, ["star"]).states.flatten()
    assert cosine_similarity(after, empty, 0) > cosine_similarity(before, empty, 0)


def test_adapter_off_is_the_frozen_model(quick, task, few):
    x, text = seeded_noise(quick, [0, 1]), encode(quick, TEXTS)
    t = torch.tensor([0.9, 0.9])
    base = velocity(quick, x, t, text, autocast=False)
    with lora.added(quick.transformer, esd.TARGETS, 2) as weights, torch.no_grad():
        for weight in weights.values():
            weight.fill_(0.1)
        assert not torch.equal(velocity(quick, x, t, text, autocast=False), base)
        with erase_anything.without_adapter(quick):
            assert torch.equal(velocity(quick, x, t, text, autocast=False), base)


def test_oce_turns_the_concept_away_and_keeps_lengths_and_angles():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    energy = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.1, 0.1], dtype=torch.float64)
    kept = basis @ energy.diag() @ basis.T
    concept, anchor = basis[:, 6:7], basis[:, 7:8]
    turn = oce.rotation(kept, concept, anchor, 1.0).double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(turn @ basis[:, :6], basis[:, :6], rtol=0, atol=1e-6)
    assert (concept.T @ turn @ concept).item() < -0.99, "where it was weak in what is kept, it turns round"
    assert torch.linalg.det(turn) > 0.99 and (anchor.T @ turn @ anchor).item() < -0.99, "with what is kept least"
    weak = oce.rotation(kept, concept, anchor, 0.05).double()
    torch.testing.assert_close(weak, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)  # negative control
    within = oce.rotation(kept, concept, concept, 1.0).double()
    torch.testing.assert_close(within, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)  # in the anchor's space


def test_oce_s_rotation_is_the_best_of_all():
    """tr(Q^T M) is at its largest: no other rotation is better."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    kept = x.T @ x / 20
    concept, anchor = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64)).Q.split([2, 1], 1)
    matrix = kept - 2.0 * concept @ (concept.T - concept.T @ anchor @ anchor.T)
    best = torch.trace(oce.rotation(kept, concept, anchor, 2.0).double().T @ matrix)
    others = torch.linalg.qr(torch.randn(500, 6, 6, generator=generator, dtype=torch.float64)).Q
    others[..., -1] *= torch.linalg.det(others).sign()[:, None]
    assert (torch.einsum("nij,ij->n", others, matrix) < best).all()
    assert torch.trace(matrix) < best - 0.1, "negative control: to change nothing is worse"


def test_gem_s_hinge_is_still_where_the_anchor_is_nearer():
    wanted, unwanted = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert gem.early(torch.arange(28)) == 10 and gem.early(torch.arange(2)) == 1
    for share, expected in ((0.0, 0.0), (0.4, 0.0), (0.75, 0.5), (1.0, 1.0)):
        learned = (wanted + share * (unwanted - wanted)).requires_grad_()
        loss = gem.hinge(learned, wanted, unwanted)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        loss.sum().backward()
        assert learned.grad.isfinite().all() and bool(learned.grad.any()) == (expected > 0)


def test_adavd_takes_out_what_is_like_the_concept():
    direction = torch.eye(4)[0]
    like, unlike = torch.tensor([[3.0, 0.1, 0, 0]]), torch.tensor([[0.2, 1.0, 1.0, 0]])
    threshold = torch.tensor([0.5])
    torch.testing.assert_close(adavd.decomposed(like, direction, threshold, 1.0), torch.tensor([[0.0, 0.1, 0, 0]]))
    torch.testing.assert_close(adavd.decomposed(like, direction, threshold, 2.0), torch.tensor([[-3.0, 0.1, 0, 0]]))
    torch.testing.assert_close(adavd.decomposed(unlike, direction, threshold, 2.0), unlike)  # negative control


def test_adavd_s_shift_opens_for_the_concept_s_words_alone(task):
    """On the embedded model, of other prompts than it was fitted to."""
    model = replace(load_model("tinyworld"), steps=4)
    state = adavd.fit(model, task, 0)
    test = task_of(tiny_world_prompts("star", unsafe=6, benign=6, seed=5))
    open_for = []
    for records in (test.unsafe, test.benign):
        values = adavd._values(model, encode(model, [record.text for record in records]), 7)
        shares = []
        for name, met in values.items():
            cosine = torch.nn.functional.normalize(met, dim=-1).mul(state[f"{name}.direction"]).sum(-1)
            shares.append((cosine > state[f"{name}.threshold"]).float().mean().item())
        open_for.append(sum(shares) / len(shares))
    assert open_for[0] > 2 * open_for[1] and open_for[1] < 0.05
