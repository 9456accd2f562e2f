"""Rows of blocks shared out to threads: the same results in the same order, and PyTorch as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from saferope_core.measure.spread import each_row


@pytest.fixture
def three():
    """PyTorch has three threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_rows_come_in_order_from_several_threads_of_one_core_each(three):
    meet, seen = threading.Barrier(3), set()

    def row(number):
        if number < 3:
            meet.wait(60)  # all three are at work at once, or this ends in an error
        seen.add(threading.get_ident())
        return number, torch.get_num_threads()

    assert each_row(row, range(9)) == [(number, 1) for number in range(9)]
    assert len(seen) == 3 and threading.get_ident() not in seen
    assert torch.get_num_threads() == 3, "control: it is one meanwhile alone"


def test_the_first_row_s_error_comes_through(three):
    def row(number):
        if number:
            raise ValueError(f"row {number}")

    with pytest.raises(ValueError, match="row 1"):
        each_row(row, range(4))
    assert torch.get_num_threads() == 3


def test_results_are_those_of_a_loop(three):
    grams = torch.randn(5, 4, 16, 16, dtype=torch.float64)
    grams = grams @ grams.mT
    found = torch.stack(each_row(lambda row: torch.linalg.eigvalsh(grams[row]), range(5)))
    torch.testing.assert_close(found, torch.linalg.eigvalsh(grams))
    assert not torch.allclose(found, found.flip(0)), "negative control: another order"
