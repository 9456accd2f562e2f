"""With the real eval-unlearn: it finds the technique, runs it, and would have written what `export` writes."""

from __future__ import annotations

import json
import logging
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_benchmark.evaluation import leaderboard
from saferope_benchmark.evaluation.file_report import evaluate_file, write_reports
from saferope_benchmark.evaluation.leaderboard import SafeRoPETechnique, export
from saferope_benchmark.pictures import to_pil
from saferope_benchmark.prompt_sets import Sizes
from saferope_benchmark.sample import sample
from saferope_core import Geometry, load_concepts, save_concepts
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import TINYWORLD
from tests.support import concepts as flat

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1
PROMPTS = ["a red star", "a blue circle", "a green star on the left"]


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    """The bundled file, in a folder of its own."""
    file = tmp_path_factory.mktemp("star") / "star.safetensors"
    file.write_bytes((ROOT / "tinyworld" / "concepts" / "star.safetensors").read_bytes())
    return file


def technique(star, **given):
    return SafeRoPETechnique(concept=str(star), model=TINYWORLD, device="cpu", steps=STEPS, **given)


def test_picture_i_has_seed_plus_i_and_is_protected(star):
    made, model = technique(star), load_model(TINYWORLD)
    found = made.generate(PROMPTS, seed=5)
    alone = [made.generate([prompt], seed=5 + i)[0] for i, prompt in enumerate(PROMPTS)]
    with made.method.context(model):
        expected = [to_pil(p) for p in sample(model, PROMPTS, [5, 6, 7], steps=STEPS, batch=4)]
    assert [p.tobytes() for p in found] == [p.tobytes() for p in expected]
    assert len(alone) == 3 and alone[0].size == found[0].size
    plain = [to_pil(p) for p in sample(model, PROMPTS, [5, 6, 7], steps=STEPS, batch=4)]
    off = technique(star, strength=0).generate(PROMPTS, seed=5)
    assert [p.tobytes() for p in off] == [p.tobytes() for p in plain]
    assert found[0].tobytes() != plain[0].tobytes(), "negative control: the star's picture changes"


def test_without_a_seed_pictures_count_on(star):
    made = technique(star, seed=5)
    first, second = made.generate(PROMPTS[:1]), made.generate(PROMPTS[1:2])
    other = technique(star)
    assert first[0].tobytes() == other.generate(PROMPTS[:1], seed=5)[0].tobytes()
    assert second[0].tobytes() == other.generate(PROMPTS[1:2], seed=6)[0].tobytes()
    assert made.generate([]) == []


def test_wrong_settings_are_refused_before_a_picture(star, tmp_path):
    with pytest.raises(TypeError, match="strenght"):
        technique(star, strenght=2)  # eval-unlearn's own techniques ignore what they do not know
    with pytest.raises(OSError, match=r"none\.safetensors"):
        technique(tmp_path / "none.safetensors")
    (concept,) = load_concepts(star)
    other = flat.changed(concept, geometry=Geometry(3, 5, 2, 128), discrimination=torch.zeros(8, 2))
    save_concepts(tmp_path / "other.safetensors", [other])
    with pytest.raises(ValueError, match="made for"):
        technique(tmp_path / "other.safetensors")


class Redness:
    """A metric in eval-unlearn's interface: the mean of a picture's red, of prompts of two categories."""

    def __init__(self):
        self.seen = []

    def load_dataset(self):
        from eval_unlearn.types import Dataset

        yield Dataset(PROMPTS[:2], {"source": "ours", "categories": ["Star", "circle"]})
        yield Dataset(PROMPTS[2:], {"source": "ours", "categories": ["Star"]})

    def update(self, images, prompts, metadata=None):
        assert len(images) == len(prompts)
        self.seen += [sum(image.getchannel("R").tobytes()) / 255 / 96**2 for image in images]

    def compute(self):
        from eval_unlearn.types import MetricResult

        return MetricResult("redness", sum(self.seen) / len(self.seen))


@pytest.fixture
def their_run(star, tmp_path):
    """Reports and files of a run of the real package."""
    logging.disable(logging.CRITICAL)  # it tells of techniques whose packages are not installed
    try:
        from eval_unlearn.registry import register_metric, register_technique
        from eval_unlearn.runners import SingleBenchmarkRunner

        group = "eval_unlearn.techniques"
        points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][group]
        for name, value in points.items():
            register_technique(name)(EntryPoint(name, value, group).load())
        register_metric("redness")(Redness)
        config = {"concept": str(star), "model": TINYWORLD, "device": "cpu", "steps": STEPS, "erase_concept": "star"}
        runner = SingleBenchmarkRunner("saferope", "redness", config, {}, str(tmp_path / "theirs"), seed=5)
        return runner.run(), tmp_path / "theirs"
    finally:
        logging.disable(logging.NOTSET)


def shape(folder: Path, run: str, technique: str, metric: str) -> set[str]:
    """Names below a folder of results, with what differs between runs named alike."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for found, put in ((run, "RUN"), (metric, "METRIC"), (technique, "TECHNIQUE")):
        names = {name.replace(found, put) for name in names}
    return names


def test_eval_unlearn_runs_it_and_export_writes_what_it_writes(star, their_run):
    theirs, folder = their_run
    assert theirs["technique_name"] == "saferope" and theirs["dataset_metadata"]["total_loaded"] == 3
    assert 0 < theirs["metric_result"]["value"] < 1
    pattern = shape(folder, theirs["run_id"], "saferope", "redness")
    assert "TECHNIQUE_METRIC_RUN/images/star/TECHNIQUE_METRIC_RUN_1.png" in pattern

    model = load_model(TINYWORLD)
    write_reports(star.parent, evaluate_file(model, star, star.parent, sizes=Sizes(2, 1, 1, 2)), star)
    out = star.parent / "results"
    done = CliRunner().invoke(cli.app, ["export", str(star), "--out", str(out)])
    assert done.exit_code == 0, done.output
    (report,) = out.glob("saferope_star_latest_report.json")
    ours = json.loads(report.read_text())
    assert ours.keys() == theirs.keys() and ours["metric_result"].keys() == theirs["metric_result"].keys()
    assert ours["erase_concept"] == theirs["erase_concept"] == "star"
    names = shape(out, ours["run_id"], "saferope", leaderboard.METRIC)
    assert "TECHNIQUE_star_latest_report.json" in names & pattern and "RUN_report.json" in names & pattern
    shown = [name for name in names if name.startswith("TECHNIQUE_METRIC_RUN/images/")]
    assert len(shown) == 6 and all(name.endswith(".png") for name in shown)


def test_a_report_of_another_file_is_not_exported(star, tmp_path):
    write_reports(star.parent, evaluate_file(load_model(TINYWORLD), star, star.parent, sizes=Sizes(2, 1, 1, 2)), star)
    assert len(export(star, tmp_path)) == 2, "the control"
    report = star.with_name("star.evaluation.json")
    report.write_text(report.read_text().replace('"file_sha256": "', '"file_sha256": "0'))
    with pytest.raises(ValueError, match="got a report of the file with sha256 0"):
        export(star, tmp_path)
    report.unlink()
    with pytest.raises(OSError):
        export(star, tmp_path)
