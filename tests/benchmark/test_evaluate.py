"""The harness: paired, resumable, the same table whatever happens. A random model and detector; what matters is the
pairing.
"""

from __future__ import annotations

import csv
import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from saferope_benchmark.evaluation import evaluate, file_report, tables
from saferope_benchmark.evaluation.methods import Method, concept_file, unprotected
from saferope_benchmark.pictures import save_picture
from saferope_benchmark.prompt_sets import Sizes, tiny_world_sets
from saferope_benchmark.scores import Absent
from saferope_benchmark.scores.detector import detector, features
from saferope_benchmark.scores.distance import distance
from saferope_benchmark.scores.kid import likeness
from saferope_core import save_concepts
from saferope_training.flux.models import TINYWORLD
from saferope_training.making import recipe
from saferope_training.making.heads import CriticalHeads
from tinyworld import detector as world_detector
from tinyworld.model import generate

SIZES = Sizes(unsafe=2, held_out=1, neighbours=1, benign=3)
PICTURES = 4 * 7  # four methods


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
        reader = world_detector.Detector().eval()
    monkeypatch.setattr(world_detector, "load_detector", lambda: reader)
    # the pipeline's own sampler in few steps
    monkeypatch.setattr(evaluate, "paint", lambda model, texts, seeds: generate(model.pipe, texts, seeds, steps=2))
    return replace(model, name=TINYWORLD)


@pytest.fixture
def fast(world, monkeypatch):
    """The same model with a painter that takes no time: noise of prompt and seed, moved by what `moving` says."""

    def paint(model, texts, seeds):
        numbers = [int.from_bytes(f"{text} {seed}".encode()) % 2**63 for text, seed in zip(texts, seeds, strict=True)]
        noise = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in numbers]
        return (torch.stack(noise) * getattr(model.pipe, "amplitude", 1.0)).clamp(-1, 1)

    monkeypatch.setattr(evaluate, "paint", paint)
    return world


@contextmanager
def amplitude(model, value):
    model.pipe.amplitude = value
    try:
        yield
    finally:
        del model.pipe.amplitude


def moving(name="saferope", value=0.5):
    return Method(name, f"amplitude {value}", lambda model: amplitude(model, value), "star", 1.0)


def nothing(name="nothing"):
    return Method(name, name, lambda model: nullcontext(), "star", 1.0)


def comparison(model, out, batch=2, sizes=SIZES, **changes):
    methods = [unprotected(), nothing(), moving(), moving("grey", 0.0)]
    metrics = [detector(), distance(features()), likeness(features())]
    sets = tiny_world_sets("star", sizes)
    return replace(evaluate.Evaluation(model, sets, methods, metrics, out, batch), **changes)


def kept(rows):
    """Rows without what a clock says."""
    return [row for row in rows if row.unit not in tables.COSTS]


def test_a_method_that_does_nothing_changes_nothing(world, star, tmp_path):
    methods = [unprotected(), nothing(), concept_file(star, 1.0, "saferope", "star")]
    rows = kept(evaluate.run(comparison(world, tmp_path / "out", batch=4, methods=methods)))
    own = [row for row in rows if row.method == "nothing"]
    assert own and all(row.value == row.unprotected for row in own if not row.unit.startswith("KID"))
    assert {row.p_value for row in own} == {1.0, None}
    assert all(row.value == 0 for row in own if "difference" in row.measure or "distance" in row.measure)
    assert all(row.value < 1e-9 for row in own if row.measure.startswith("FID to base"))
    turned = {(row.measure, row.set): row.value for row in rows if row.method == "saferope"}
    assert turned["mean difference", "benign"] > 0.01 and turned["FID to base, detector", "benign"] > 1e-9


@pytest.mark.parametrize("stage, at", [("pictures", 5), ("pictures", 21), ("scores", 3)])
def test_interrupted_and_called_again_it_gives_the_same(fast, tmp_path, stage, at):
    """Bit for bit: rows, raw scores, pictures."""
    whole, broken = (comparison(fast, tmp_path / name) for name in ("whole", "broken"))
    expected = kept(evaluate.run(whole))

    def interrupt(now, done, total):
        if now == stage and done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.run(broken, interrupt)
    done = {path: path.stat().st_mtime_ns for path in broken.out.rglob("*.png")}
    assert 0 < len(done) and (stage == "scores") == (len(done) == PICTURES), "in the middle, or this shows nothing"
    assert kept(evaluate.run(broken)) == expected
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "what was done is not done again"
    for e in (whole, broken):
        evaluate.write_raw(e)
    assert (whole.out / evaluate.RAW).read_bytes() == (broken.out / evaluate.RAW).read_bytes()
    for path in whole.out.rglob("*.png"):
        assert path.read_bytes() == (broken.out / path.relative_to(whole.out)).read_bytes()


def test_a_half_painted_chunk_is_painted_again(fast, tmp_path):
    e = comparison(fast, tmp_path / "out")
    real, count = evaluate.write_pictures, []

    def dying(folder, first, pictures, cost, key):
        count.append(1)
        if len(count) == 3:
            folder.mkdir(parents=True, exist_ok=True)
            save_picture(folder / f"{first:04d}.png", torch.zeros_like(pictures[0]))
            raise KeyboardInterrupt
        real(folder, first, pictures, cost, key)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_pictures", dying)
        evaluate.run(e)
    assert kept(evaluate.run(e)) == kept(evaluate.run(replace(e, out=tmp_path / "other")))


def test_other_inputs_are_painted_anew(fast, tmp_path):
    """A folder holds what it says, whoever used it before: another strength, another seed, a lost picture."""
    out = tmp_path / "out"
    first = comparison(fast, out)
    evaluate.run(first)
    methods = [unprotected(), moving(value=0.7)]  # the same folder
    other = replace(first, methods=methods)
    rows = kept(evaluate.run(other))
    assert rows == kept(evaluate.run(replace(other, out=tmp_path / "fresh")))
    (out / "unprotected" / "star-benign" / "0001.png").unlink()
    assert kept(evaluate.run(other)) == rows
    moved = replace(other, sets=tiny_world_sets("star", SIZES, seed=7))
    assert kept(evaluate.run(moved)) == kept(evaluate.run(replace(moved, out=tmp_path / "fresh")))


def test_order_of_prompts_does_not_matter(fast, tmp_path):
    """Paired by prompt and seed, not by place: a shuffled set gives the same rates and the same p."""
    straight = comparison(fast, tmp_path / "straight", batch=1)
    shuffled = [replace(s, asks=s.asks[::-1]) for s in straight.sets][::-1]
    other = kept(evaluate.run(replace(straight, sets=shuffled, out=tmp_path / "shuffled")))
    by_name = {(row.method, row.set, row.measure): row for row in other}
    for row in kept(evaluate.run(straight)):
        found = by_name[row.method, row.set, row.measure]
        assert found.p_value == row.p_value
        assert (found.interval is None) == (row.interval is None)
        assert found.interval is None or found.interval == pytest.approx(row.interval, rel=1e-6, abs=1e-9)
        assert found.value == pytest.approx(row.value, rel=1e-6, abs=1e-9)


def test_tables_raw_scores_and_grids_are_written(fast, tmp_path):
    e = comparison(fast, tmp_path / "out")
    rows = evaluate.run(e)
    evaluate.write(e, rows, [Absent("CLIP", "no CLIP model named; name one")], "a comparison")
    facts = json.loads((e.out / "evaluation.json").read_text())
    assert [entry["measure"] for entry in facts["rows"]] == [row.measure for row in rows]
    assert facts["left_out"] == [{"name": "CLIP", "why": "no CLIP model named; name one"}]
    lines = list(csv.DictReader((e.out / "evaluation.csv").open()))
    assert len(lines) == len(rows) and set(lines[0]) == set(asdict(rows[0]))
    text = (e.out / "evaluation.md").read_text()
    assert "**CLIP**: no CLIP model named" in text and "## star" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["unprotected", "nothing, 1", "saferope, 1", "grey, 1"]
    assert "not measured" not in text and "concept shown, unsafe" in table[0] and "memory" in table[0]
    raw = [json.loads(line) for line in (e.out / evaluate.RAW).open()]
    assert len(raw) == PICTURES and all((e.out / entry["picture"]).is_file() for entry in raw)
    assert {"prompt", "seed", "detector/shown", "distance/pixels"} <= set(raw[0])
    assert (e.out / "pairs-star.png").stat().st_size > 1000
    assert not [path for path in e.out.rglob(".*")], "no partial file is left"


def test_what_would_mix_up_pictures_is_refused(fast, tmp_path):
    e = comparison(fast, tmp_path)
    with pytest.raises(ValueError, match="expected 'unprotected' as the first"):
        evaluate.run(replace(e, methods=e.methods[1:]))
    with pytest.raises(ValueError, match="expected different names"):
        evaluate.run(replace(e, methods=[*e.methods, nothing()]))


def rows_of(report):
    return {row.measure: row for row in report.rows}


def test_strength_decides_whether_pictures_differ(world, star, tmp_path):
    (off,) = file_report.evaluate_file(world, star, tmp_path, 0.0, SIZES)
    (on,) = file_report.evaluate_file(world, star, tmp_path, 1.0, SIZES)
    assert rows_of(off)["mean difference, benign"].protected == 0, "paired: same prompts, same noise, no protection"
    assert rows_of(on)["mean difference, benign"].protected > 0.01
    for report in (off, on):
        for row in report.rows[:2]:
            assert row.unprotected_interval[0] <= row.unprotected <= row.unprotected_interval[1]
    assert all(row.unprotected == row.protected for row in off.rows if not row.unit)


def test_reports_of_a_file_are_written_and_agree(world, star, tmp_path):
    told = []
    reports = file_report.evaluate_file(world, star, tmp_path, 1.0, SIZES, progress=lambda *step: told.append(step))
    assert ("pictures", 14, 14) in told
    file_report.write_reports(tmp_path, reports, star)
    facts = json.loads((tmp_path / "star.evaluation.json").read_text())
    lines = list(csv.DictReader((tmp_path / "star.evaluation.csv").open()))
    assert [line["measure"] for line in lines] == [row["measure"] for row in facts["rows"]]
    named = {"star shown, unsafe", "star shown, held-out words", "shape right, neighbours", "time per picture"}
    named |= {"all attributes right, benign", "mean difference, benign", "rest of the prompt right, unsafe"}
    assert named <= set(rows_of(reports[0]))
    table = (tmp_path / "star.evaluation.md").read_text()
    assert table.count("\n|") == len(lines) + 2 and facts["file_sha256"][:12] in table
    assert (tmp_path / "star.evaluation.png").stat().st_size > 1000


def test_another_version_of_a_concept_has_a_report_of_its_own(tmp_path):
    """`evaluate star.v2` wrote over the report of `star`, and the card of `star` printed it."""
    rows, shown = [file_report.Pair("star shown, unsafe", 64, 1.0, 0.0)], [("x", torch.zeros(1, 3, 8, 8))]
    old, new = (file_report.Report("star", digit * 64, "tinyworld", 1.0, 1, rows, shown) for digit in "01")
    file_report.write_reports(tmp_path, [old], Path("star.safetensors"))
    file_report.write_reports(tmp_path, [new], Path("star.v2.safetensors"))
    file_report.write_reports(tmp_path, [new, replace(new, concept="swirl")], Path("star.both.safetensors"))
    read = {path.name: file_report.read_report(path).file_sha256[0] for path in tmp_path.glob("*.json")}
    assert read == {
        "star.evaluation.json": "0",
        "star.v2.evaluation.json": "1",
        "star.both.star.evaluation.json": "1",
        "star.both.swirl.evaluation.json": "1",
    }


def test_other_models_are_refused(model, star, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "tiny", False)
    with pytest.raises(ValueError, match="the only one with a detector"):
        file_report.evaluate_file(model, star, tmp_path)
