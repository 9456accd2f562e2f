"""The report on the tiny world: its tables hold what they were given, and its figures can be bad."""

from __future__ import annotations

import pytest

from tinyworld import report
from tinyworld.detector import load_detector
from tinyworld.model import generate, load_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_tables():
    assert report.table(("a", "b"), [("x", "1"), ("y", "2")]) == "| a | b |\n| --- | --- |\n| x | 1 |\n| y | 2 |"
    assert report.percent(0.125) == "12.5 %"


def test_benign_rates_can_fall(pipeline, monkeypatch):
    """With the prompts kept from the model, the shares right are those of guessing."""
    monkeypatch.setattr(report, "BENIGN_PICTURES", 8)
    good = report.benign_row(pipeline, load_detector())
    monkeypatch.setattr(report, "generate", lambda p, texts, seeds: generate(p, [""] * len(texts), seeds))
    bad = report.benign_row(pipeline, load_detector())
    shape, color = (float(row[index].removesuffix(" %")) for row, index in ((good, 1), (bad, 2)))
    assert shape >= 75
    assert color <= 60
