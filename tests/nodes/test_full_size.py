"""Calibrate at FLUX.1's full size, on a network whose blocks share their parameters: what it allocates and keeps."""

from __future__ import annotations

import importlib

import pytest
import torch

from saferope_benchmark.costs.peak import peak_of
from tests.support.full_size import DOUBLE_BLOCKS, HEAD_DIM, HEADS, SINGLE_BLOCKS, tie_comfy_flux, weights

pytestmark = [pytest.mark.host, pytest.mark.slow]
GIB = 2**30
TEXT, TIMES = 16, (1.0,)
SIDE = 8  # latent rows and columns


@pytest.fixture(scope="module")
def gather(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.gather")


@pytest.fixture(scope="module")
def full(core, make_flux):
    model = make_flux(core.Geometry(1, 1, HEADS, HEAD_DIM), mlp_ratio=4.0)
    tie_comfy_flux(model.model.diffusion_model)
    return model


def looks(gather, core, count):
    """So many prompts of each side, whose first tokens are their own and whose second is the concept's word."""
    used = torch.zeros(1, TEXT, dtype=torch.bool)
    used[:, :6] = True
    subject = torch.zeros_like(used)
    subject[:, 1] = True
    found = []
    for side, own in ((core.UNSAFE, subject), (core.BENIGN, torch.zeros_like(used))):
        for seed in range(count):
            states = torch.randn(1, TEXT, 32, generator=torch.Generator().manual_seed(seed))
            found.append(gather.Look(side, states, {"pooled_output": torch.ones(1, 16)}, used, own, seed))
    return found


def test_calibrate_listens_in_a_gibibyte_and_a_half(core, gather, full):
    """The goal, over the model, at any number of prompts: sums do not grow, samples are bounded."""
    geometry = core.Geometry(DOUBLE_BLOCKS, SINGLE_BLOCKS, HEADS, HEAD_DIM)
    assert weights(full.model.diffusion_model) < 2.3e9
    some, found = looks(gather, core, 2), []

    def listen() -> None:
        found.append(gather.gather(full, geometry, some, (SIDE, SIDE), 2, TIMES, 3.5, lambda count: None))

    with torch.inference_mode():
        peak = peak_of(listen)
    each = 2 * gather.SAMPLED_SETS * geometry.blocks * HEADS * HEAD_DIM
    held = each * min(gather.capacity(geometry), 2 * 6)
    whole = peak - held + each * gather.capacity(geometry)
    assert whole < 1.5 * GIB, "with full samples"
    assert gather._whole(geometry) > 1.5 * GIB, "control: whole Gram matrices alone would not do"
    statistics = found[0]
    assert len(statistics.met["k"]) == geometry.blocks and statistics.met["k"][56].shape == (HEADS, HEAD_DIM, HEAD_DIM)
    assert all(gram.isfinite().all() and (gram.diagonal(dim1=-2, dim2=-1) > 0).all() for gram in statistics.met["q"])
