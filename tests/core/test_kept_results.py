"""The same results as before the code moved into its rooms, in tests/files/kept_results.json, by that commit."""

from __future__ import annotations

import json

import pytest

from tests.support import kept

BEFORE = json.loads((kept.ROOT / kept.FILE).read_text(encoding="utf-8"))
# Sums of 128 products of numbers up to 8, in float32: n u Σ|x y| <= 128 x 2^-24 x 128 x 64, and a turn's own rounding
CLOSE = 0.5


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return kept.results(tmp_path_factory.mktemp("kept"))


def test_files_selections_and_audits_are_the_same(now):
    for name in ("files", "parts", "audits"):
        assert now[name] == BEFORE[name], name
    assert len(BEFORE["audits"]) > 20


def test_merging_is_the_same(now):
    assert now["merged"]["overlap"] == pytest.approx(BEFORE["merged"]["overlap"], rel=1e-5)


def test_the_same_tokens_turn_to_the_same_vectors(now):
    turned = 0
    for case, blocks in BEFORE["rotated"].items():
        for block, expected in blocks.items():
            found = now["rotated"][case][block]
            assert found["turned"] == expected["turned"], (case, block)
            turned += sum(map(sum, expected["turned"]))
            for row, other in zip(found["sums"], expected["sums"], strict=True):
                assert row == pytest.approx(other, abs=CLOSE)
    assert turned > 50, "control: tokens turn"


def test_another_strength_is_another_result():
    """The control of the tolerance."""
    full, half = (BEFORE["rotated"][f"star {strength}"] for strength in (1.0, 0.5))
    rows = [
        (r, s)
        for x, y in zip(full.values(), half.values(), strict=True)
        for r, s in zip(x["sums"], y["sums"], strict=True)
    ]
    assert max(abs(a - b) for row, other in rows for a, b in zip(row, other, strict=True)) > 20 * CLOSE
