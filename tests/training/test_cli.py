"""The command line: help comes at once, mistakes are told in a sentence, stages are reused, and the whole slice runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from training import cli, recipe
from training.settings import Settings


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_needs_no_torch(arguments):
    code = f"import sys; from training import cli\ntry: cli.app({arguments!r})\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout and run.stdout.strip().endswith("False")


def test_python_m_training_runs():
    run = subprocess.run([sys.executable, "-m", "training", "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "train" in run.stdout and "evaluate" in run.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["train", "star", "--out", "x", "--basis", "nonsense"], "got 'nonsense', expected svd or contrastive"),
        (["train", "star", "--out", "x", "--rank", "1"], "got 1, expected at least 2"),
        (["train", "star", "--out", "x", "--model", "/nowhere"], "no folder with a model_index.json"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, told):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert told in " ".join(result.output.split()) and "Traceback" not in result.output


def test_command_line_offers_the_settings_defaults(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr("training.models.load_model", lambda name, device: None)
    monkeypatch.setattr("training.recipe.make_concept", lambda model, settings, *_: made.update(settings=settings))
    result = CliRunner().invoke(cli.app, ["train", "zappy", "--out", str(tmp_path), "--rank", "4"])
    assert result.exit_code == 0, result.output
    assert made["settings"] == Settings(concept="zappy", rank=4)


@pytest.fixture
def small(settings):
    return replace(settings, unsafe_prompts=6, benign_prompts=6, steps=2)


def stages_run(model, settings, out):
    ran = []
    recipe.make_concept(model, settings, out, lambda stage, done, total: ran.append(stage))
    return [stage for stage in dict.fromkeys(ran) if ran.count(stage) > 1]


def test_recipe_leaves_every_product_and_reuses_stages(model, small, tmp_path):
    assert stages_run(model, small, tmp_path) == ["extract", "train"], "those two report progress while they run"
    products = {"prompts.jsonl", "statistics.safetensors", "heads.csv", "heads.safetensors", "head_map.png"}
    products |= {"log.jsonl", "losses.png", "star.safetensors", "config.json", "stages.json"}
    assert {path.name for path in tmp_path.iterdir()} == products
    first = (tmp_path / "star.safetensors").read_bytes()

    assert stages_run(model, small, tmp_path) == [], "nothing changed"
    assert stages_run(model, replace(small, steps=3), tmp_path) == ["train"]
    assert (tmp_path / "star.safetensors").read_bytes() != first
    assert stages_run(model, replace(small, timesteps=(1.0,)), tmp_path) == ["extract", "train"]
    (tmp_path / "heads.safetensors").unlink()
    stages_run(model, replace(small, timesteps=(1.0,)), tmp_path)
    assert (tmp_path / "heads.safetensors").is_file(), "a product that is gone is made again"


def test_a_failed_stage_runs_again(model, small, tmp_path):
    with pytest.raises(ValueError, match="no head"):
        recipe.make_concept(model, replace(small, cut=2.0), tmp_path)
    with pytest.raises(ValueError, match="no head"):
        recipe.make_concept(model, replace(small, cut=2.0), tmp_path)
    assert recipe.make_concept(model, small, tmp_path).is_file()
