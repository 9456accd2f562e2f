"""What a step costs on a GPU, counted: the figures that docs/performance.md rests on."""

from __future__ import annotations

import pytest

from saferope_benchmark.costs.counting import CARDS, LAUNCH, MODELS, Kernel, count
from saferope_benchmark.costs.rotation import TRAINED, Size

# Bytes of FLUX.1-dev's weights in bf16 (tests/training/test_memory.py): less than it has at its peak without protection
WEIGHTS = 23.8e9
FLUX, H100 = MODELS["FLUX.1"], CARDS["H100 class"]


def test_a_step_of_flux_is_as_long_as_its_products():
    """12 billion parameters and 4,608 tokens: 74 TFLOP, 106 ms at 700 TFLOP/s."""
    assert 2 * FLUX.products == pytest.approx(74.3e12, rel=0.005)
    assert 2 * FLUX.products / H100.rate == pytest.approx(0.106, rel=0.005)


def test_a_kernel_takes_the_longest_of_three_times():
    assert Kernel("a", 1).seconds(H100) == LAUNCH
    assert Kernel("a", 3 * 10**9).seconds(H100) == pytest.approx(1e-3)
    assert Kernel("a", 1, 350 * 10**9).seconds(H100) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("form", "concepts", "kernels", "gigabytes", "share"),
    [
        ("fused", 1, 1, 2.13, 0.010),
        ("fused", 3, 1, 2.2, 0.012),
        ("plain", 1, 10, 15.4, 0.085),
        ("plain", 3, 16, 35.1, 0.16),
    ],
)
def test_what_a_step_of_flux_costs(form, concepts, kernels, gigabytes, share):
    """One read of text keys in 57 blocks and of image queries and keys in 38 is 2.09 GB."""
    counted = count(form, FLUX, Size(concepts=concepts, **TRAINED))
    calls = 57 + 2 * 38
    once = 57 * 24 * 512 * 256 + 76 * 24 * 4096 * 256
    assert len(counted.image) == len(counted.text) == kernels
    assert counted.total(lambda _: 1) == kernels * calls
    assert once < counted.total(lambda each: each.bytes) <= gigabytes * 1e9
    assert 0 < counted.share(H100, FLUX) <= share


def test_the_count_sees_copies_and_the_recorder():
    """Control: the dense form widens all it reads, and what it costs shows."""
    size = Size(**TRAINED)
    dense, plain, fused = (count(form, FLUX, size) for form in ("dense", "plain", "fused"))
    assert dense.total(lambda each: each.bytes) > 4 * plain.total(lambda each: each.bytes)
    assert len(dense.image) > 30 and any(each.name == "_to_copy" for each in dense.image)
    recorded = count("fused", FLUX, size, recorded=True)
    assert [each.name for each in recorded.image + recorded.text] == ["turn", "turn"], "told by the same kernel"
    part = count("fused", FLUX, Size(critical=1 / 3, **TRAINED))
    assert part.total(lambda each: each.bytes) == pytest.approx(fused.total(lambda each: each.bytes) / 3, rel=0.01)


@pytest.mark.parametrize("concepts", [1, 3])
def test_the_recorder_costs_the_plain_form_three_kernels(concepts):
    size = Size(concepts=concepts, **TRAINED)
    bare, recorded = (count("plain", FLUX, size, recorded=each) for each in (False, True))
    assert [each.name for each in recorded.image[len(bare.image) :]] == ["gt", "sum", "add_"]


@pytest.mark.parametrize(("form", "concepts"), [("fused", 1), ("fused", 3), ("plain", 1), ("plain", 3)])
def test_protection_takes_a_hundredth_of_the_memory(form, concepts):
    """All 1,368 heads. Planes alone: 128 rows of 24 columns of planes and 16 of the unsafe subspace, bf16."""
    counted = count(form, FLUX, Size(concepts=concepts, **TRAINED))
    planes = 2 * 128 * (24 + 16) * 24 * (57 + 2 * 38) * concepts
    assert planes < counted.planes < 1.02 * planes
    assert counted.planes + counted.most < 0.01 * WEIGHTS
    assert counted.most <= {"fused": 0, "plain": 33e6 * concepts}[form]
    dense = count("dense", FLUX, Size(concepts=concepts, **TRAINED))
    assert dense.planes + dense.most > (1.5 if form == "fused" else 1.0) * (counted.planes + counted.most), "control"
