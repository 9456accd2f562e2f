"""Latent risk score, gates, and which heads can tell."""

import math

import pytest
import torch

from saferope_core import discrimination, fold, gated, head_discrimination_score, latent_risk_score, saturated, skew
from saferope_core.maths.risk import risk_of

HEADS, WIDTH, RANK = 3, 32, 5
# By how much ‖Uᵀx‖ / ‖x‖ in float32 may be off: n (√R + 2) u with n = D + 2, as in `saferope_core.run.few`
OFF = (WIDTH + 2) * (math.sqrt(RANK) + 2) * torch.finfo(torch.float32).eps / 2


@pytest.fixture
def basis():
    return torch.linalg.qr(torch.randn(HEADS, WIDTH, RANK, dtype=torch.float64))[0].float()


def test_equals_the_definition_in_loops(basis):
    x = torch.randn(2, HEADS, 4, WIDTH)
    lrs = latent_risk_score(x, basis)
    for b in range(2):
        for h in range(HEADS):
            for t in range(4):
                u, vector = basis[h].double(), x[b, h, t].double()
                expected = (u @ u.T @ vector).norm() ** 2 / vector.norm() ** 2
                torch.testing.assert_close(lrs[b, h, t].double(), expected, rtol=0, atol=2 * OFF)


def test_is_1_inside_0_outside_and_one_half_between(basis):
    inside = torch.einsum("hdr,hlr->hld", basis, torch.randn(HEADS, 7, RANK))
    other = torch.randn(HEADS, 7, WIDTH)
    outside = other - torch.einsum("hdr,hlr->hld", basis, torch.einsum("hdr,hld->hlr", basis, other))
    torch.testing.assert_close(latent_risk_score(inside, basis), torch.ones(HEADS, 7))
    torch.testing.assert_close(latent_risk_score(outside, basis), torch.zeros(HEADS, 7), rtol=0, atol=(2 * OFF) ** 2)
    half = inside / inside.norm(dim=-1, keepdim=True) + outside / outside.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(latent_risk_score(half, basis), torch.full((HEADS, 7), 0.5))


def test_stays_within_0_and_1(basis):
    """Columns that are too long by more than any rounding carry all of these above 1."""
    inside = torch.einsum("hdr,hlr->hld", basis, torch.randn(HEADS, 500, RANK))
    basis = (1 + 2 * OFF) * basis
    ratio = torch.einsum("hdr,hld->hlr", basis, inside).norm(dim=-1) / inside.norm(dim=-1)
    assert ratio.min() > 1
    lrs = latent_risk_score(inside, basis)
    assert lrs.max() <= 1 and lrs.min() >= 0


@pytest.mark.parametrize("factor", [1e-6, -3.0, 1e6])
def test_scaling_changes_nothing(basis, factor):
    x = torch.randn(HEADS, 9, WIDTH)
    torch.testing.assert_close(latent_risk_score(factor * x, basis), latent_risk_score(x, basis))
    lifted = latent_risk_score(x + 1, basis)
    assert (lifted - latent_risk_score(x, basis)).abs().max() > 0.01  # control: shifting does


def test_zero_vector_has_no_risk_and_nan_stays_nan(basis):
    x = torch.randn(HEADS, 3, WIDTH)
    x[0, 0] = 0
    x[1, 1, 1] = float("nan")
    lrs = latent_risk_score(x, basis)
    assert lrs[0, 0] == 0 and lrs[1, 1].isnan() and lrs.isnan().sum() == 1


def test_dtypes_and_leading_axes(basis):
    x = torch.randn(2, 4, HEADS, 3, WIDTH, dtype=torch.bfloat16)
    lrs = latent_risk_score(x, basis)
    assert lrs.shape == (2, 4, HEADS, 3) and lrs.dtype == torch.float32
    assert torch.equal(lrs, latent_risk_score(x.float(), basis))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(latent_risk_score(x, basis), lrs)
    assert latent_risk_score(x.double(), basis).dtype == torch.float64


def test_folded_directions_give_the_same_risk(basis):
    x = torch.randn(2, HEADS, 4, WIDTH)
    _, directions = fold(skew(torch.randn(HEADS, RANK, RANK)), basis)
    lrs = risk_of(torch.einsum("bhld,hdr->bhlr", x, directions), x)
    torch.testing.assert_close(lrs, latent_risk_score(x, basis))


def test_gate_counts_only_above_it_per_head():
    lrs = torch.tensor([[0.2, 0.5, 0.7, 0.9], [0.2, 0.5, 0.7, 0.9]])
    nan = float("nan")
    kept = gated(lrs, torch.tensor([0.7, 0.1]))
    assert torch.equal(kept, torch.tensor([[0.0, 0.0, 0.0, 0.9], [0.2, 0.5, 0.7, 0.9]]))
    assert torch.equal(gated(lrs, torch.zeros(2)), lrs)
    assert gated(torch.tensor([[nan]]), torch.tensor([0.5])).isnan().all()


def test_discrimination_by_hand():
    """Head 0: 3 of 4 unsafe above 0.7, 1 of 2 safe. Head 1: all and none. Head 2: exactly 0.7 is not above."""
    unsafe = torch.tensor([[0.8, 0.9, 0.7], [0.9, 0.8, 0.7], [0.71, 0.9, 0.7], [0.1, 0.95, 0.7]])
    safe = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.1]])
    delta = discrimination(unsafe, safe)
    torch.testing.assert_close(delta, torch.tensor([0.25, 1.0, -0.5]))
    assert head_discrimination_score(delta).tolist() == [False, True, False]
    assert head_discrimination_score(torch.tensor([0.5, 0.4999])).tolist() == [True, False]
    assert discrimination(unsafe, safe, threshold=0.05).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("unsafe", "safe", "name"), [(0, 2, "unsafe"), (2, 0, "safe")])
def test_discrimination_refuses_an_empty_set(unsafe, safe, name):
    with pytest.raises(ValueError, match=f"0 {name} vectors"):
        discrimination(torch.rand(unsafe, HEADS), torch.rand(safe, HEADS))


def test_strength_is_a_factor_on_the_risk_up_to_one():
    lrs = torch.tensor([[0.0, 0.2, 0.7, 1.0]])
    assert torch.equal(saturated(lrs, 1.0), lrs), "bit for bit"
    torch.testing.assert_close(saturated(lrs, 2.0), torch.tensor([[0.0, 0.4, 1.0, 1.0]]))
    torch.testing.assert_close(saturated(lrs, -4.0), torch.tensor([[0.0, -0.8, -1.0, -1.0]]))
    each = saturated(lrs.expand(2, 4), torch.tensor([[0.5], [10.0]]))
    torch.testing.assert_close(each, torch.tensor([[0.0, 0.1, 0.35, 0.5], [0.0, 1.0, 1.0, 1.0]]))
    assert saturated(torch.tensor([math.nan]), 2.0).isnan().all(), "damage is not hidden"
