"""The cheap look at all tokens: it may take in too many, and must never lose one that the exact form would turn."""

from types import SimpleNamespace

import pytest
import torch

from saferope_core import Geometry, Protection
from saferope_core.run import few as screen
from saferope_core.run import protection
from saferope_core.run.dense import scales_of

HEADS, TOKENS, WIDTH = 3, 256, 128
GEOMETRY = Geometry(double_blocks=1, single_blocks=1, heads=HEADS, head_dim=WIDTH)
SPANS = (0, 100), (100, TOKENS)
NARROW, WIDE = {"rank": 5}, {"rank": 24, "reach": 8}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=[NARROW, WIDE], ids=["rank 5", "rank 16, reach 8"])
def concept(request, make_concept):
    gates = torch.tensor([0.05, 0.3, 0.9])
    return make_concept(
        heads=[(1, 0, h) for h in range(HEADS)], geometry=GEOMETRY, gate_q=gates, gate_k=gates, **request.param
    )


def at_share(concept, share):
    """float64 vectors [1, H, L, D] of length 1, random but for their LRS, which is share [H or 1, L]."""
    basis = concept.text.basis.q.double()
    inside = basis[..., : basis.shape[-1] - concept.reach]
    a = torch.einsum("hlr,hdr->hld", torch.randn(HEADS, TOKENS, inside.shape[-1]).double(), inside)
    b = torch.randn(HEADS, TOKENS, WIDTH).double()
    b = b - b @ inside @ inside.mT
    share = share.double().clamp(0, 1)[..., None]
    x = share.sqrt() * a / a.norm(dim=-1, keepdim=True) + (1 - share).sqrt() * b / b.norm(dim=-1, keepdim=True)
    return x[None]


def near_the_gate(concept, dtype, length=1.0):
    """Vectors [1, H, L, D] whose LRS is the gate of their head up to some rounding of `dtype`, at about this length."""
    share = concept.text.gate.q.double()[:, None] + torch.linspace(-1e-6, 1e-6, TOKENS)
    return (length * at_share(concept, share)).to(dtype)


def undecided(concepts, x):
    """bool [B, H, L]: where two computations may answer otherwise: within the margin of a gate, and at lengths for
    which `screen` proves none.
    """
    exact = screen.wide(x).double()
    length = exact.norm(dim=-1)
    found = (length < screen.SMALLEST) | (length > screen.LARGEST)
    for concept in concepts:
        heads = concept.heads[:, 2].long()
        inside = concept.text.basis.q.double()[..., : concept.text.basis.q.shape[-1] - concept.reach]
        ratio = torch.einsum("bhld,hdr->bhlr", exact[:, heads], inside).norm(dim=-1) / length[:, heads]
        off = (ratio - concept.gate("q").double().sqrt()[:, None]).abs()
        found[:, heads] |= off <= allowed(concepts, x)
    return found


def allowed(concepts, x):
    """The margin of the look in the dtype that x is turned in."""
    return screen.margin(WIDTH, sum(concept.text.basis.q.shape[-1] for concept in concepts), screen.wide(x).dtype)


def assert_turned_alike(result, expected, concepts, x, where):
    """Vectors agree to what rounding may do to the largest angle θ, and to rounding into their dtype.

    With ‖Uᵀx‖ / ‖x‖ off by less than m, coordinates are off by m ‖x‖, the LRS by 2 m, and a turned vector by
    (2 θ + 1) m ‖x‖ for every concept.
    """
    theta = max(
        torch.linalg.matrix_norm(each, 2).max().item()
        for c in concepts
        for each in (c.text.generator, c.image.generator)
    )
    bound = len(concepts) * (2 * theta + 1) * allowed(concepts, x) + torch.finfo(x.dtype).eps
    top = torch.finfo(x.dtype).max  # a large vector may round to infinity or to this
    a, b, length = (each[where].double().clamp(-top, top) for each in (result, expected, x))
    off, length = (a - b).norm(dim=-1), length.norm(dim=-1)
    damaged = a.isnan().any(-1) & b.isnan().any(-1)
    assert (damaged | (off <= bound * length)).all(), (off / length).nan_to_num().max()


def turned(concepts, x, monkeypatch, gathers):
    """(result, bool [B, H, L]: told to be above a gate by any concept), by one way or the other."""
    monkeypatch.setattr(protection, "form_of", lambda x: "gathered" if gathers else "dense")
    told = torch.zeros(x.shape[:3], dtype=torch.bool)

    def saw(_concept, row, stream, heads, passed):
        first, last = SPANS[stream == "image"]
        told[:, heads, first:last] |= passed

    return Protection(concepts, GEOMETRY).rotate(x, "q", "single", 0, *SPANS, seen=SimpleNamespace(saw=saw)), told


def lost(concept, x):
    """How many tokens the exact form would turn and the look leaves out, and how many it takes in."""
    plan = Protection([concept], GEOMETRY)._plans_for("dense", x)[1, "q", "text"]
    maybe = screen._maybe(x, plan)
    scale, _ = scales_of(screen.wide(x), plan)
    return int((scale[0].ne(0) & ~maybe).sum()), int(maybe.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1e-25, 1e-19, 1e-6, 1.0, 1e4, 1e18, 3e19, 1e30])
def test_no_token_near_its_gate_is_lost(concept, dtype, length):
    """At lengths whose squares leave float32's range, too. 1e30 and 1e-25 are infinity and 0 in half precision."""
    missed, taken = lost(concept, near_the_gate(concept, dtype, length))
    assert missed == 0 and taken > 0


@pytest.mark.parametrize("piece", [1, 1000, 2**14, 2**30])
def test_pieces_of_any_size_lose_nothing(concept, monkeypatch, piece):
    monkeypatch.setattr(screen, "PIECE", piece)
    assert lost(concept, near_the_gate(concept, torch.float32))[0] == 0


def test_a_margin_that_is_too_small_is_caught(concept, monkeypatch):
    """Negative control: what rounding might do is done by hand.
    The look's lengths are short by the bound of rounding."""
    bound = screen.margin(WIDTH, concept.text.basis.q.shape[-1], torch.float32) / 2
    x = at_share(
        concept, (concept.text.gate.q.double().sqrt()[:, None] + bound / 2).square().expand(HEADS, TOKENS)
    ).float()
    look = screen._inside
    monkeypatch.setattr(screen, "_inside", lambda *args: look(*args) - bound)
    assert lost(concept, x)[0] == 0, "the margin is wide enough for it"
    monkeypatch.setattr(screen, "margin", lambda *_: 0.0)
    assert lost(concept, x)[0] == HEADS * TOKENS
    monkeypatch.setattr(screen, "_inside", look)
    monkeypatch.setattr(screen, "margin", lambda *_: -2 * bound)
    assert lost(concept, x)[0] == HEADS * TOKENS, "nor may the margin have the wrong sign"


def test_the_margin_is_small_and_bounds_what_rounding_does():
    assert screen.margin(128, 24, torch.float32) < 5e-4
    basis = torch.linalg.qr(torch.randn(WIDTH, 24, dtype=torch.float64))[0]
    x = torch.randn(4096, WIDTH)
    exact = (x.double() @ basis).norm(dim=-1) / x.double().norm(dim=-1)
    single = (x @ basis.float()).norm(dim=-1) / x.norm(dim=-1)
    error = (exact - single).abs().max().item()
    assert 0 < error < screen.margin(WIDTH, 24, torch.float32) / 2


def damaged(x):
    """Some tokens of x replaced by what arithmetic trips over."""
    x = x.clone()
    top = torch.finfo(x.dtype).max
    x[:, :, 10:20] = 0.0
    x[:, :, 20:25] = -0.0
    x[:, 0, 30, 3] = float("nan")
    x[:, 1, 31, 4], x[:, 2, 32, 5] = float("inf"), -float("inf")
    x[:, :, 40:50] = top
    x[:, :, 50:60] = torch.finfo(x.dtype).tiny
    x[:, :, 60:70] *= torch.finfo(x.dtype).smallest_normal
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [True, False])
def test_the_gathered_way_turns_what_the_dense_way_turns(concept, make_concept, monkeypatch, dtype, near):
    """Told and written alike, with two concepts, -0.0 and NaN included; tokens left alone come back bit for bit."""
    other = make_concept("zappy", rank=4, heads=[(1, 0, 0), (1, 0, 1)], geometry=GEOMETRY, threshold=0.12)
    x = damaged(near_the_gate(concept, dtype) if near else torch.randn(2, HEADS, TOKENS, WIDTH).to(dtype))
    dense, told_dense = turned([concept, other], x, monkeypatch, False)
    few, told_few = turned([concept, other], x, monkeypatch, True)
    differ = told_dense != told_few
    assert not (differ & ~undecided([concept, other], x)).any() and told_few.any()
    assert_turned_alike(few, dense, [concept, other], x, ~differ)
    with pytest.raises(AssertionError):  # control
        assert_turned_alike(x, dense, [concept, other], x, told_dense)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(few[~told_few].view(bits), x[~told_few].view(bits))
    assert told_few[:, 0, 30].all() and few[:, 0, 30].isnan().any(), "NaN is not hidden"
    assert not told_few[:, :, 10:25].any(), "the zero vector has no risk"


@pytest.mark.parametrize("layout", ["as diffusers has it", "a slice", "one memory for the batch"])
def test_any_layout(concept, monkeypatch, layout):
    x = torch.randn(2, HEADS, TOKENS, WIDTH)
    if layout == "as diffusers has it":
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "a slice":
        strided = torch.cat((x, x), dim=-1)[..., :WIDTH]
    else:
        strided = x[:1].expand(2, -1, -1, -1)
    result, told = turned([concept], strided, monkeypatch, True)
    expected, told_there = turned([concept], strided.contiguous(), monkeypatch, True)
    assert not ((told != told_there) & ~undecided([concept], strided)).any()
    assert_turned_alike(result, expected, [concept], strided, told == told_there)
    assert told.any() and not told.all()


def test_no_candidate_or_no_token_gives_x_itself(concept, monkeypatch):
    x = torch.randn(1, HEADS, TOKENS, WIDTH)
    guard = Protection([concept], GEOMETRY, thresholds=[1.0])
    assert guard.rotate(x, "q", "single", 0, *SPANS) is x
    assert guard.rotate(x, "q", "single", 0, (0, 0), (5, 5)) is x
    assert guard.rotate(x[:0], "q", "single", 0, *SPANS).shape == x[:0].shape
    candidates = near_the_gate(concept, torch.float64).float()
    lower = torch.nextafter(candidates, torch.zeros(()))
    assert lost(concept, lower)[1] > 0, "the case below is one with candidates"


def test_many_candidates_are_not_gathered(concept, monkeypatch):
    """All tokens above their gates: dense arithmetic, the same result."""
    monkeypatch.setattr(screen.Few, "gather", None)
    guard = Protection([concept], GEOMETRY, thresholds=[0.0])
    x = torch.randn(1, HEADS, TOKENS, WIDTH)
    assert (guard.rotate(x, "q", "single", 0, *SPANS) != x).any(-1).all()
    with pytest.raises(TypeError):  # control
        Protection([concept], GEOMETRY, thresholds=[0.35]).rotate(x, "q", "single", 0, *SPANS)
