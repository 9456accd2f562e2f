"""Losses and metrics against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch

from saferope_benchmark.scores.metrics import mcnemar, pixel_difference, rate, wilson_interval
from saferope_training.making.losses import flow_matching_loss, unlearning_loss, velocity_matching_loss

V = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_losses_are_zero_at_equality():
    for loss in (unlearning_loss(V, V), velocity_matching_loss(V, V), flow_matching_loss(V, torch.zeros_like(V), V)):
        assert loss.shape == (len(V),) and not loss.any()


def test_losses_are_not_zero_elsewhere():
    assert velocity_matching_loss(V, V + 2).tolist() == pytest.approx([4, 4], rel=1e-6)
    assert unlearning_loss(V, V + 1).tolist() == pytest.approx([-math.tanh(1)] * 2, rel=1e-6)
    assert flow_matching_loss(V, V, V).tolist() == pytest.approx(V.square().mean((1, 2)).tolist(), rel=1e-6)


def test_losses_are_every_prompts_own():
    other = torch.stack([V[0], V[1] + 3])
    assert velocity_matching_loss(V, other).tolist() == pytest.approx([0, 9], rel=1e-6)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 1e4])
def test_unlearning_loss_is_bounded_and_falls_with_distance(distance):
    near, far = unlearning_loss(V, V + distance), unlearning_loss(V, V + 1.1 * distance)
    assert (far >= -1).all() and (far <= near).all() and (near < 0).all()


def test_losses_are_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        loss = velocity_matching_loss(V.bfloat16(), V.bfloat16() + 1)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "hits, trials, low, high",
    [
        (0, 10, 0.0, 0.2775),  # R: prop.test(0, 10, correct = FALSE)$conf.int
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval_known_values(hits, trials, low, high):
    assert wilson_interval(hits, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_narrows_with_trials():
    low, high = wilson_interval(500, 1000)
    assert (high - low) < 0.2 < wilson_interval(5, 10)[1] - wilson_interval(5, 10)[0]
    assert wilson_interval(0, 0) == (0, 1)


def test_mcnemar_counts_changed_pairs_only():
    before = torch.tensor([True] * 6 + [False] * 2 + [True] * 90)
    after = torch.tensor([False] * 6 + [True] * 2 + [True] * 90)
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 8 + 28) / 2**8)  # binomial(8, 1/2), at most 2
    assert mcnemar(before, before) == 1


def test_pixel_difference_is_in_grey_levels():
    black = -torch.ones(1, 3, 4, 4)
    assert pixel_difference(black, -black) == 255
    assert pixel_difference(black, black) == 0


def test_rate():
    assert rate(torch.tensor([True, False, False, False])) == 0.25
    assert rate(torch.tensor([], dtype=torch.bool)) == 0
