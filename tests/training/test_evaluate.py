"""Evaluation: paired pictures, honest tables. A random detector reads random pictures; what matters is the pairing."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from saferope_core import save_concepts
from tinyworld import detector
from training import evaluate, recipe
from training.heads import CriticalHeads
from training.models import TINYWORLD

SIZES = evaluate.Sizes(unsafe=3, held_out=2, neighbours=2, benign=4)


@pytest.fixture
def star(model, settings, tmp_path):
    """A concept file that turns every token of every head far."""
    generator = torch.Generator().manual_seed(0)
    places = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    basis, _ = torch.linalg.qr(torch.randn(6, 16, 4, generator=generator))
    gate = torch.zeros(6)
    critical = CriticalHeads(
        torch.tensor(places, dtype=torch.int32), {"q": basis, "k": basis}, {"q": gate, "k": gate}, None
    )
    turned = torch.randn(6, 4, 4, generator=generator) * 10
    generators = (turned - turned.mT, torch.zeros(6, 4, 4))
    concept = recipe.concept_of(model, critical, torch.ones(3, 2), generators, settings, record={})
    save_concepts(tmp_path / "star.safetensors", [concept])
    return tmp_path / "star.safetensors"


@pytest.fixture
def world(model, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader = detector.Detector().eval()
    monkeypatch.setattr(detector, "load_detector", lambda: reader)
    return replace(model, name=TINYWORLD)


def rows(report):
    return {row.measure: row for row in report.rows}


def test_strength_decides_whether_pictures_differ(world, star):
    (off,) = evaluate.evaluate(world, star, strength=0.0, sizes=SIZES)
    (on,) = evaluate.evaluate(world, star, strength=1.0, sizes=SIZES)
    assert rows(off)["mean difference, benign"].protected == 0, "paired: same prompts, same noise, no protection"
    assert rows(on)["mean difference, benign"].protected > 0.01
    for report in (off, on):
        for row in report.rows[:2]:
            assert row.unprotected_interval[0] <= row.unprotected <= row.unprotected_interval[1]
    assert all(row.unprotected == row.protected for row in off.rows if not row.unit)


def test_reports_are_written_and_agree(world, star, tmp_path):
    told = []
    reports = evaluate.evaluate(world, star, sizes=SIZES, progress=lambda *step: told.append(step))
    assert told[-1] == ("pictures", 22, 22)
    evaluate.write_reports(tmp_path, reports)
    facts = json.loads((tmp_path / "star.evaluation.json").read_text())
    lines = list(csv.DictReader((tmp_path / "star.evaluation.csv").open()))
    assert [line["measure"] for line in lines] == [row["measure"] for row in facts["rows"]]
    assert {"star shown, unsafe", "star shown, held-out words", "all attributes right, benign"} <= set(rows(reports[0]))
    table = (tmp_path / "star.evaluation.md").read_text()
    assert table.count("\n|") == len(lines) + 2 and facts["file_sha256"][:12] in table
    assert (tmp_path / "star.evaluation.png").stat().st_size > 1000


def test_other_models_are_refused(model, star):
    with pytest.raises(ValueError, match="only it has a detector"):
        evaluate.evaluate(model, star)
