"""Gates from safe tokens, and generators without training."""

import math

import pytest
import torch

from saferope_core import calibrate_gate, fixed_generator, gated, planes


def test_gate_by_hand():
    lrs = torch.arange(1, 11)[torch.randperm(10), None] / 10 * torch.tensor([1.0, 0.5])
    torch.testing.assert_close(calibrate_gate(lrs, 0.9), torch.tensor([0.9, 0.45]))
    torch.testing.assert_close(calibrate_gate(lrs, 0.81), torch.tensor([0.9, 0.45]))
    torch.testing.assert_close(calibrate_gate(lrs, 1.0), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_at_most_the_rest_of_the_safe_vectors_turns(quantile, count):
    lrs = torch.rand(count, 3)
    gate = calibrate_gate(lrs, quantile)
    turned = gated(lrs.T, gate) > 0
    assert (turned.float().mean(1) <= 1 - quantile + 1e-6).all()
    if count == 1000:  # control: the next lower gate would turn more than that
        lower = lrs.where(lrs < gate, 0).max(0).values
        assert ((lrs > lower).float().mean(0) > 1 - quantile - 1e-6).all()


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.01, math.nan])
def test_quantile_must_be_a_share(quantile):
    with pytest.raises(ValueError, match=r"quantile is .*, expected a share"):
        calibrate_gate(torch.rand(10, 2), quantile)


def test_gate_needs_finite_vectors():
    with pytest.raises(ValueError, match="got 0 rows"):
        calibrate_gate(torch.rand(0, 2))
    with pytest.raises(ValueError, match="NaN among them"):
        calibrate_gate(torch.full((3, 2), math.nan))


@pytest.mark.parametrize("rank", [2, 5, 6])
def test_fixed_generator_turns_neighbouring_columns(rank):
    generator = fixed_generator(rank, 2.1, 4)
    assert generator.shape == (4, rank, rank) and generator.dtype == torch.float32
    assert torch.equal(generator, -generator.mT)
    theta, _, _ = planes(generator)
    torch.testing.assert_close(theta, torch.full((4, rank // 2), 2.1, dtype=torch.float64), rtol=1e-7, atol=0)
    rotated = torch.linalg.matrix_exp(generator[0].double() / 2.1 * math.pi / 2)[:, 0]
    torch.testing.assert_close(rotated, torch.eye(rank, dtype=torch.float64)[1], rtol=0, atol=1e-6)
    if rank % 2:
        assert not generator[:, -1].any() and not generator[:, :, -1].any()


def test_rank_1_holds_no_plane():
    with pytest.raises(ValueError, match="rank is 1, expected at least 2"):
        fixed_generator(1, 2.1, 4)
