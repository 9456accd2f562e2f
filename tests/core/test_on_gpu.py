"""The forms for GPUs on a GPU: compiled kernels, not the interpreter, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from saferope_core import Forward, Geometry, Protection
from saferope_core.maths.risk import latent_risk_score
from saferope_core.run import protection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = Geometry(double_blocks=1, single_blocks=1, heads=3, head_dim=128)
TEXT, IMAGE = (0, 40), (40, 150)
# error of a turned vector, of its length: four roundings to the dtype, see docs/performance.md for the measured ones
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NEAR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a gate, in LRS: rounding may decide
FORMS = ["fused", "plain", "dense"]


@pytest.fixture
def concepts(make_concept):
    """Three, of other widths and heads, each with a risk that some random vectors have."""
    heads = [(0, 0, 0), (1, 0, 0), (1, 0, 2)]
    first = make_concept(geometry=WIDE, heads=heads, rank=16, threshold=0.13)
    second = make_concept("zappy", geometry=WIDE, heads=heads[1:], rank=8, threshold=0.07)
    return [first, second, make_concept("swirl", geometry=WIDE, heads=[(1, 0, 1)], rank=12, threshold=0.1)]


def turned(monkeypatch, form, guard, x, seen=None, own=False):
    monkeypatch.setattr(protection, "form_of", lambda x: form)
    return guard.rotate(x, "q", "single", 0, TEXT, IMAGE, seen=seen, own=own)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("form", FORMS)
def test_equals_float64_on_the_cpu(monkeypatch, concepts, form, dtype, count):
    guard = Protection(concepts[:count], WIDE)
    x = torch.randn(2, 150, 3, 128).to(dtype).transpose(1, 2)
    result = turned(monkeypatch, form, guard, x.cuda()).cpu().double()
    exact = turned(monkeypatch, "dense", guard, x.double())
    sure = torch.ones(x.shape[:3], dtype=torch.bool)
    for concept in concepts[:count]:
        rows = (concept.heads[:, 0] == 1).nonzero()[:, 0]
        heads = concept.heads[rows, 2].long()
        risk = latent_risk_score(x[:, heads].double(), concept.basis("q")[rows].double())
        sure[:, heads] &= (risk - concept.threshold).abs() > NEAR[dtype]
    error = (result - exact).norm(dim=-1) / x.double().norm(dim=-1)
    assert error[sure].max() < ERROR[dtype] and sure.double().mean() > 0.5
    moved = (exact != x.double()).any(-1)
    assert moved.any() and not moved.all(), "control: some turn, not all"
    if form == "fused":
        assert torch.equal(result[~moved & sure], x.double()[~moved & sure])
    assert ((x.double() - exact).norm(dim=-1) / x.double().norm(dim=-1))[moved].max() > 0.1, "control: by far"


@pytest.mark.parametrize("form", ["fused", "plain"])
def test_the_recorder_counts_what_turns(monkeypatch, concepts, form):
    guard, x = Protection(concepts[:1], WIDE), torch.randn(2, 3, 150, 128, device="cuda", dtype=torch.bfloat16)
    seen = Forward(["a prompt", "another"], 1.0, (10, 11))
    result = turned(monkeypatch, form, guard, x, seen)
    moved = (result != x).any(-1)
    told = seen.room(((0, 2),), "image", x[:, :, slice(*IMAGE)])
    assert torch.equal(told[0].long(), moved[:, :, slice(*IMAGE)].sum(1)) and moved.any()


def test_a_cuda_graph_replays_it(monkeypatch, concepts):
    guard, x = Protection(concepts, WIDE), torch.randn(1, 3, 150, 128, device="cuda", dtype=torch.bfloat16)
    still = x.clone()
    turned(monkeypatch, "fused", guard, still, own=True)  # compiles, and makes its plans
    expected, graph, given = still.clone(), torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        turned(monkeypatch, "fused", guard, given, own=True)
    given.copy_(x)
    graph.replay()
    assert torch.equal(given, expected) and not torch.equal(given, x)


def test_inductor_keeps_it_in_the_graph(monkeypatch, concepts):
    guard, x = Protection(concepts, WIDE), torch.randn(1, 3, 150, 128, device="cuda")
    turned(monkeypatch, "fused", guard, x)

    def block(x):
        return guard.rotate(2 * x, "q", "single", 0, TEXT, IMAGE, own=True) + 1

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    assert not torch.allclose(block(x), 2 * x + 1, atol=1e-2), "control"
