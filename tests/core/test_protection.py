"""Protection: the object both hosts ask, against the paper's equations written out in loops."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from saferope_core import FLUX1, Protection
from saferope_core.run import forms, protection
from tests.support import concepts as flat

TEXT, IMAGE = (1, 5), (5, 11)  # tokens 0, 11 and 12 belong to nobody
SHAPE = (2, 3, 13, 32)
SINGLE_1 = ("single", 1)


EXACT, PACKED = ["gathered", "dense"], ["plain", "fused"]


@pytest.fixture(params=[*EXACT, *PACKED])
def path(request, monkeypatch):
    """All forms, the kernel for GPUs too, through Triton's interpreter."""
    monkeypatch.setattr(protection, "form_of", lambda x: request.param)
    return request.param


@pytest.fixture(params=EXACT)
def exact_path(request, monkeypatch):
    monkeypatch.setattr(protection, "form_of", lambda x: request.param)


@pytest.fixture(params=PACKED)
def packed_path(request, monkeypatch):
    monkeypatch.setattr(protection, "form_of", lambda x: request.param)


def rotate(protection, x, role="q", block=SINGLE_1, text=TEXT, image=IMAGE):
    return protection.rotate(x, role, *block, text, image)


def vectors(dtype=torch.float32):
    return torch.randn(SHAPE).to(dtype)


def changed(result, x):
    """bool [B, H, L]: tokens with any different entry."""
    return (result != x).any(-1)


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("block", [("double", 0), ("double", 1), ("single", 1)])
def test_equals_the_equations_in_loops(path, make_concept, geometry, naive_protection, role, block):
    concept = make_concept(gate_k=torch.linspace(0.05, 0.3, 6), strength=0.8)
    x = vectors()
    result = rotate(Protection([concept], geometry, strengths=[1.2]), x, role, block)
    code = (["double", "single"].index(block[0]), block[1])
    expected = naive_protection([concept], x, role, code, TEXT, IMAGE, strengths=[1.2])
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    assert changed(result, x).any() and not changed(result, x).all()


def test_several_concepts_one_after_another(path, make_concept, geometry, naive_protection):
    """Different heads, ranks and gates; each LRS from the unrotated vector, so that gating does not depend on order."""
    first = make_concept(threshold=0.0)
    second = make_concept("zappy", rank=8, heads=[(0, 0, 1), (1, 1, 1), (1, 1, 2)], threshold=0.25)
    third = make_concept("swirl", rank=2, heads=[(1, 0, 0)])
    x = vectors()
    result = rotate(Protection([first, second, third], geometry), x)
    expected = naive_protection([first, second, third], x, "q", (1, 1), TEXT, IMAGE)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    swapped = rotate(Protection([second, first], geometry), x)
    assert (swapped - result).abs().max() > 1e-3  # control: overlapping rotations do not commute
    gating_by_rotated = rotate(Protection([second], geometry), rotate(Protection([first], geometry), x))
    assert (gating_by_rotated - result).abs().max() > 1e-3  # control: two patches in a row are something else


def test_vectors_turn_fully_at_their_heads_full_risk(path, make_concept, geometry, naive_protection):
    """Beside a concept without, in heads that both and only one of them turn; some vectors turn fully, some do not."""
    full = torch.linspace(0.1, 0.6, 6)
    concept = make_concept(full_q=full, gate_q=torch.full((6,), 0.05))
    other = make_concept("zappy", rank=4, heads=[(1, 1, 0), (1, 1, 1)])
    x = vectors()
    result = rotate(Protection([concept, other], geometry, strengths=[0.7, 1.0]), x)
    expected = naive_protection([concept, other], x, "q", (1, 1), TEXT, IMAGE, strengths=[0.7, 1.0])
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    plain = rotate(Protection([flat.changed(concept, full_q=None), other], geometry, strengths=[0.7, 1.0]), x)
    assert (plain - result).abs().max() > 1e-2, "control"
    keys = [rotate(Protection([each], geometry), x, "k") for each in (concept, flat.changed(concept, full_q=None))]
    assert torch.equal(*keys), "queries alone have a full risk of their own"


def test_image_tokens_have_the_full_risk_of_their_bases_owner(path, make_concept, geometry, naive_protection):
    x, own = vectors(), {f"basis_image_{role}": torch.linalg.qr(torch.randn(6, 32, 5)).Q for role in "qk"}
    for more in ({}, own | {"full_image_q": torch.full((6,), 0.3)}, own):
        concept = make_concept(full_q=torch.full((6,), 0.6), **more)
        result = rotate(Protection([concept], geometry), x)
        expected = naive_protection([concept], x, "q", (1, 1), TEXT, IMAGE)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_a_threshold_that_no_relative_risk_reaches_is_refused(make_concept, geometry):
    concept = make_concept(acts_on="k", full_k=torch.full((6,), 0.02), full_q=torch.ones(6), reach=3)
    message = r"thresholds: got 0.7 for concept 'star', expected less than 0.02: .* take the concept's own gates"
    with pytest.raises(ValueError, match=message):
        Protection([concept], geometry, thresholds=[0.7])
    for strength, threshold in ((0.0, 0.7), (1.0, 0.01), (1.0, 1.0), (1.0, None)):
        Protection([concept], geometry, strengths=[strength], thresholds=[threshold])  # off, in reach, never, its own
    Protection([flat.changed(concept, full_k=None)], geometry, thresholds=[0.7])  # control


def test_reach_turns_but_is_no_risk(path, make_concept, geometry, naive_protection):
    """Beside a concept of another width, in heads that both and only one of them turn."""
    concept = make_concept(rank=7, reach=3, threshold=0.1)
    other = make_concept("zappy", rank=4, heads=[(1, 1, 0), (1, 1, 1)])
    x = vectors()
    result = rotate(Protection([concept, other], geometry), x)
    expected = naive_protection([concept, other], x, "q", (1, 1), TEXT, IMAGE)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    whole = flat.changed(concept, reach=0)
    assert (rotate(Protection([whole, other], geometry), x) - result).abs().max() > 1e-3, "control: risk in all columns"


def test_image_tokens_may_have_bases_of_their_own(path, make_concept, geometry, naive_protection):
    """Narrower than the text's, with gates of their own."""
    wide = make_concept(rank=7, reach=2)
    own = {f"basis_image_{role}": torch.linalg.qr(torch.randn(6, 32, 4)).Q for role in "qk"}
    skewed = torch.randn(6, 4, 4)
    own |= {"generator_image": skewed - skewed.mT, "gate_image_q": torch.linspace(0.0, 0.1, 6)}
    own |= {"acts_on": "k", "acts_on_image": "qk"}
    concept = flat.changed(wide, **own)
    for role in "qk":
        x = vectors()
        result = rotate(Protection([concept], geometry), x, role)
        expected = naive_protection([concept], x, role, (1, 1), TEXT, IMAGE)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
        other = rotate(Protection([wide], geometry), x, role)
        before = other if role == "k" else x
        assert torch.equal(result[:, :, : IMAGE[0]], before[:, :, : IMAGE[0]]), "text as before, of keys alone"
        assert (result - other).abs().max() > 1e-3, "control: images not"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded(exact_path, make_concept, geometry, dtype):
    """With two concepts: nothing is rounded between them either."""
    guard = Protection([make_concept(), make_concept("zappy")], geometry)
    x = vectors(dtype)
    result = rotate(guard, x)
    assert result.dtype == dtype and changed(result, x).any()
    assert (result - rotate(guard, x.float()).to(dtype)).abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_gpu_forms_is_off_by_its_directions_rounding(
    packed_path, make_concept, geometry, naive_protection, dtype
):
    """Rounded by u = eps / 2, W directions put coordinates off by √W u ‖x‖, risk by twice, a turn by (2 θ + 1) times
    that; rounding what is added and the sum, by 2 u ‖x‖ more. At gate 0, so that no gate decides."""
    concepts = [make_concept(threshold=0.0), make_concept("zappy", rank=8, threshold=0.0)]
    x = vectors(dtype)
    result = rotate(Protection(concepts, geometry), x)
    expected = naive_protection(concepts, x, "q", (1, 1), TEXT, IMAGE)
    angles = [
        torch.linalg.matrix_norm(each.generator(s), 2).max().item() for each in concepts for s in ("text", "image")
    ]
    unit, length = torch.finfo(dtype).eps / 2, x.double().norm(dim=-1)
    bound = unit * (2 + len(concepts) * (2 * max(angles) + 1) * 8**0.5) * length
    assert result.dtype == dtype
    assert ((result.double() - expected).norm(dim=-1) <= bound).all()
    assert not ((x.double() - expected).norm(dim=-1) <= bound).all(), "control"


def test_the_form_is_chosen_by_device_dtype_and_gradients(monkeypatch):
    on_gpu = SimpleNamespace(type="cuda")

    def form(device, dtype=torch.bfloat16, requires_grad=False, triton=True, step=1):
        monkeypatch.setattr(forms, "_has_triton", lambda device: triton)
        x = SimpleNamespace(device=device, dtype=dtype, requires_grad=requires_grad, stride=lambda _: step)
        return forms.form_of(x)

    assert form(SimpleNamespace(type="cpu")) == form(SimpleNamespace(type="cpu"), requires_grad=True) == "gathered"
    assert form(on_gpu) == "fused" and form(on_gpu, requires_grad=True) == "dense"
    assert form(on_gpu, triton=False) == form(on_gpu, torch.float64) == form(on_gpu, step=2) == "plain"
    assert form(SimpleNamespace(type="mps")) == "plain"


def test_float64_stays_float64(path, make_concept, geometry, naive_protection):
    concept = make_concept()
    x = vectors(torch.float64)
    result = rotate(Protection([concept], geometry), x)
    expected = naive_protection([concept], x, "q", (1, 1), TEXT, IMAGE)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # as exact as the concept's float32


def test_norms_are_kept_and_the_input_is_not_written_to(path, make_concept, geometry):
    x = vectors()
    before = x.clone()
    result = rotate(Protection([make_concept()], geometry), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(result.norm(dim=-1), x.norm(dim=-1))
    assert changed(result, x).any()


def test_what_the_caller_owns_is_written_to(path, make_concept, geometry):
    guard, x = Protection([make_concept()], geometry), vectors()
    expected = rotate(guard, x)
    own = x.clone()
    assert guard.rotate(own, "q", *SINGLE_1, TEXT, IMAGE, own=True) is own
    assert torch.equal(own, expected) and not torch.equal(own, x)
    with pytest.raises(ValueError, match="gradients are kept"):
        guard.rotate(x.requires_grad_(), "q", *SINGLE_1, TEXT, IMAGE, own=True)


def test_only_tokens_in_the_spans_turn(path, make_concept, geometry):
    guard = Protection([make_concept(threshold=0.0)], geometry)
    x = vectors()
    turned = changed(rotate(guard, x), x).all(0).all(0)
    assert turned.tolist() == [False] + [True] * 10 + [False, False]
    only_text = changed(rotate(guard, x, image=(0, 0)), x).all(0).all(0)
    assert only_text.nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_only_safety_critical_heads_turn(path, make_concept, geometry):
    guard = Protection([make_concept(threshold=0.0)], geometry)
    x = vectors()
    turned = changed(rotate(guard, x, block=("double", 0)), x)
    assert turned[:, [0, 2], 1:11].all() and not turned[:, 1].any()


def test_only_tokens_above_the_gate_turn(path, make_concept, geometry, clear):
    concept = make_concept(gate_q=torch.tensor([0.1, 0.1, 0.1, 0.1, 1.0, 0.0]))
    x = vectors()
    x[:, 0, 3] = concept.text.basis.q[3] @ torch.randn(5)  # certainly inside the subspace of head 0
    turned = changed(rotate(Protection([concept], geometry), x), x)[:, :, 1:11]
    basis = concept.text.basis.q[3:].double()
    inside = torch.einsum("bhld,hdr->bhlr", x[:, :, 1:11].double(), basis)
    lrs = inside.square().sum(-1) / x[:, :, 1:11].double().square().sum(-1)
    gates = torch.tensor([0.1, 1.0, 0.0])[:, None]
    assert (lrs - gates).abs().min() > clear, "choose other examples: here rounding decides"
    assert torch.equal(turned, lrs > gates)
    assert turned[:, 0, 2].all() and not turned[:, 0].all() and not turned[:, 1].any() and turned[:, 2].all()


def test_bits_survive_where_nothing_turns(path, make_concept, geometry):
    """-0.0 and infinity too, beside tokens that do turn."""
    x = vectors()
    x[:, :, 0, 0], x[:, :, 12, 0] = -0.0, float("inf")
    concept = make_concept(threshold=0.15)
    x[:, :, 2] = 0.0
    x[:, :, 2, 1] = -0.0  # in the span, but its LRS is 0
    result = rotate(Protection([concept], geometry), x)
    still = ~changed(result, x)
    if path != "plain":  # which may make 0.0 of a -0.0
        assert torch.equal(result[still].view(torch.int32), x[still].view(torch.int32))
    assert still[:, :, [0, 2, 12]].all() and not still.all()


def test_nan_is_not_hidden(path, make_concept, geometry):
    x = vectors()
    x[0, 1, 3, 7] = float("nan")
    broken = rotate(Protection([make_concept()], geometry), x).isnan().any(-1)
    assert broken[0, 1, 3] and broken.sum() == 1


def same_object_cases(make_concept):
    zero = torch.zeros(6, 5, 5)
    return {
        "strength 0": ([make_concept()], {"strengths": [0.0]}, {}),
        "own strength 0": ([make_concept(strength=0.0)], {}, {}),
        "no concepts": ([], {}, {}),
        "block without heads": ([make_concept()], {}, {"block": ("single", 0)}),
        "other role": ([make_concept(acts_on="k")], {}, {"role": "q"}),
        "zero generators": ([make_concept(generator_text=zero, generator_image=zero)], {}, {}),
        "zero image generator": ([make_concept(generator_image=zero)], {}, {"text": (0, 0)}),
        "empty spans": ([make_concept()], {}, {"text": (0, 0), "image": (7, 7)}),
        "gate 1": ([make_concept()], {"thresholds": [1.0]}, {}),
    }


@pytest.mark.parametrize(
    "case",
    [
        "strength 0",
        "own strength 0",
        "no concepts",
        "block without heads",
        "other role",
        "zero generators",
        "zero image generator",
        "empty spans",
        "gate 1",
    ],
)
def test_nothing_to_do_returns_the_same_object(make_concept, geometry, case):
    concepts, options, call = same_object_cases(make_concept)[case]
    x = vectors()
    assert rotate(Protection(concepts, geometry, **options), x, **call) is x
    assert rotate(Protection([make_concept()], geometry), x) is not x  # control


def test_a_concept_at_strength_0_leaves_the_other_alone(make_concept, geometry):
    first, second = make_concept(), make_concept("zappy")
    x = vectors()
    assert torch.equal(
        rotate(Protection([first, second], geometry, strengths=[0.0, 1.0]), x),
        rotate(Protection([second], geometry), x),
    )


@pytest.mark.parametrize(("acts_on", "turning"), [("qk", "qk"), ("q", "q"), ("k", "k")])
def test_acts_on_decides_which_roles_turn(make_concept, geometry, acts_on, turning):
    guard = Protection([make_concept(acts_on=acts_on)], geometry)
    x = vectors()
    assert [role for role in "qk" if rotate(guard, x, role) is not x] == list(turning)


def test_zero_generator_of_one_stream_or_head_leaves_it_alone(path, make_concept, geometry):
    text = make_concept().text.generator.clone()
    text[4] = 0  # head 1 of single block 1
    concept = make_concept(generator_text=text, generator_image=torch.zeros(6, 5, 5), threshold=0.0)
    x = vectors()
    x[:, 1, :, 0] = -0.0  # a turn by angle 0 would make it 0.0
    result = rotate(Protection([concept], geometry), x)
    turned = changed(result, x)
    assert turned[:, [0, 2], 1:5].all() and not turned[:, :, 5:].any()
    assert torch.equal(result[:, 1].view(torch.int32), x[:, 1].view(torch.int32))


def test_thresholds_replace_the_gates_of_both_roles(make_concept, geometry, naive_protection):
    concept = make_concept(gate_q=torch.full((6,), 0.9), gate_k=torch.full((6,), 0.9))
    x = vectors()
    for threshold in (None, 0.05, 0.2):
        for role in "qk":
            result = rotate(Protection([concept], geometry, thresholds=[threshold]), x, role)
            expected = naive_protection([concept], x, role, (1, 1), TEXT, IMAGE, thresholds=[threshold])
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
            assert changed(result, x).any() == (threshold is not None)


def test_covers_exactly_the_blocks_that_can_turn(make_concept, geometry):
    guard = Protection([make_concept(heads=[(0, 1, 0), (1, 2, 0)])], geometry)
    blocks = [("double", i) for i in range(2)] + [("single", i) for i in range(3)]
    assert [guard.covers(*block) for block in blocks] == [False, True, False, False, True]
    off = Protection([make_concept()], geometry, strengths=[0.0])
    assert not any(off.covers(*block) for block in blocks)
    with pytest.raises(ValueError, match="single block 3 asked for, but the model is flux: 2 double"):
        guard.covers("single", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": [1.0, 1.0]}, "strengths: got 2, expected one for each of the 1 concepts"),
        ({"thresholds": []}, "thresholds: got 0"),
        ({"strengths": [float("nan")]}, "strengths: got nan for concept 'star', expected a finite number"),
        ({"strengths": [None]}, "strengths: got None"),
        ({"thresholds": [1.5]}, "thresholds: got 1.5 for concept 'star', expected 0 to 1, or None"),
        ({"thresholds": [float("nan")]}, "thresholds: got nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(make_concept, geometry, options, message):
    with pytest.raises(ValueError, match=message):
        Protection([make_concept()], geometry, **options)


def test_a_concept_of_another_geometry_is_refused(make_concept):
    message = r"concept 'star' was made for flux: 2 double .*, but the model is FLUX\.1"
    with pytest.raises(ValueError, match=message):
        Protection([make_concept()], FLUX1)


def test_spans_outside_the_tokens_are_the_callers_mistake(make_concept, geometry):
    with pytest.raises(AssertionError, match="image span"):
        rotate(Protection([make_concept()], geometry), vectors(), image=(5, 14))


def test_autocast_changes_nothing(path, make_concept, geometry):
    guard = Protection([make_concept(), make_concept("zappy")], geometry)
    x = vectors()
    expected = rotate(guard, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotate(guard, x), expected)


def test_gradients_flow_after_use_in_inference_mode(exact_path, make_concept, geometry):
    """What is prepared in inference mode must not be an inference tensor: training may use the same object later."""
    with torch.inference_mode():
        guard = Protection([make_concept()], geometry)
        expected = rotate(guard, vectors())
    torch.manual_seed(1)
    x = vectors(torch.float64).requires_grad_()
    towards = torch.randn(SHAPE, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((rotate(guard, x) * towards).sum(), x)
    assert expected.shape == SHAPE and gradient.isfinite().all()
    assert torch.equal(gradient[:, :, 12], towards[:, :, 12])  # outside the spans: the identity
    step = 1e-6 * torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        difference = ((rotate(guard, x + step) - rotate(guard, x - step)) * towards).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=0)


def test_strided_input_as_diffusers_hands_it(path, make_concept, geometry):
    guard = Protection([make_concept()], geometry)
    x = vectors().transpose(1, 2).contiguous().transpose(1, 2)  # stored as B L H D
    torch.testing.assert_close(rotate(guard, x), rotate(guard, x.contiguous()))
    twice = rotate(guard, vectors()[:1].expand(2, -1, -1, -1))  # both batch entries in one memory
    torch.testing.assert_close(twice[0], twice[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_leaves_nothing_for_rotate(make_concept, geometry, monkeypatch, dtype):
    guard, x = Protection([make_concept()], geometry), torch.randn(1, 3, 5, 32).to(dtype)
    monkeypatch.setattr(protection, "form_of", lambda x: "plain")
    expected = guard.rotate(x, "q", "single", 1, (0, 2), (2, 5))
    guard.clear()
    guard.prepare(x.device, dtype)
    monkeypatch.setattr(guard, "_prepare", lambda *_: pytest.fail("prepared twice"))
    assert torch.equal(guard.rotate(x, "q", "single", 1, (0, 2), (2, 5)), expected) and not torch.equal(expected, x)
    with pytest.raises(pytest.fail.Exception, match="prepared twice"):  # control: another dtype
        guard.rotate(x.double(), "q", "single", 1, (0, 2), (2, 5))


def test_clear_drops_what_was_prepared(make_concept, geometry, monkeypatch):
    made = []
    prepare = protection.plans_of
    monkeypatch.setattr(protection, "plans_of", lambda *args: made.append(1) or prepare(*args))
    guard = Protection([make_concept()], geometry)
    x = vectors()
    first = rotate(guard, x)
    assert torch.equal(rotate(guard, x), first) and len(made) == 1
    guard.clear()
    assert torch.equal(rotate(guard, x), first) and len(made) == 1, "folded once"


def test_threads_prepare_once_and_agree(make_concept, geometry, monkeypatch):
    made = []
    prepare = protection.plans_of
    monkeypatch.setattr(protection, "plans_of", lambda *args: made.append(1) or prepare(*args))
    guard = Protection([make_concept()], geometry)
    x, results = vectors(), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=lambda: results.append(rotate(guard, x))) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(made) == 1 and len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_agrees_and_never_waits(make_concept, geometry):
    guard = Protection([make_concept(), make_concept("zappy", rank=8)], geometry)
    x = vectors()
    on_gpu = x.cuda()
    rotate(guard, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = rotate(guard, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), rotate(guard, x), rtol=0, atol=1e-5)
