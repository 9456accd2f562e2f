"""Many prompts at one server: the pictures are those of a fresh one, and memory stays. 200 of them: `python -m
tests.support.load`.
"""

from __future__ import annotations

import pytest

from tests.support.load import DIFFERENT, measure, slope

pytestmark = pytest.mark.host
MOST = 2000  # KB a prompt over a dozen prompts, where an allocator still settles; a leaked model would be 40,000


@pytest.mark.slow
def test_pictures_and_memory_after_prompts_with_changing_concepts():
    figures = measure(DIFFERENT + 8)
    assert figures["pictures that differ"] == 0
    assert figures["different pictures"] == DIFFERENT, "control: concepts and strengths did change them"
    assert figures["KB a prompt"] < MOST


def test_a_slope_is_found():
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx((2.0, 0.0))
    growth, error = slope([0.0, 1.0, 0.0, 1.0, 0.0])
    assert abs(growth) < error
