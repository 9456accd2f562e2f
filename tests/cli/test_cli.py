"""The command line: help comes at once, mistakes are told in a sentence, stages are reused, and
the whole slice runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dev.comfyui import ROOT
from saferope import cli
from saferope_core import load_concepts
from saferope_training.making import recipe
from saferope_training.settings import Settings


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_needs_no_torch(arguments):
    code = f"import sys; from saferope import cli\ntry: cli.app({arguments!r})\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout and run.stdout.strip().endswith("False")


def test_python_m_saferope_runs():
    run = subprocess.run([sys.executable, "-m", "saferope", "--help"], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0 and "train" in run.stdout and "evaluate" in run.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["train", "star", "--out", "x", "--basis", "nonsense"], "got 'nonsense', expected svd or contrastive"),
        (["train", "star", "--out", "x", "--rank", "0"], "got 0, expected at least 1"),
        (["train", "star", "--out", "x", "--model", "/nowhere"], "no folder with a model_index.json"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, told):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split()) and "Traceback" not in result.output


def test_command_line_offers_the_settings_defaults(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr("saferope_training.flux.loading.load_model", lambda *_: None)
    monkeypatch.setattr(
        "saferope_training.making.recipe.Recipe.train", lambda self, *_: made.update(settings=self.settings)
    )
    result = CliRunner().invoke(cli.app, ["train", "zappy", "--out", str(tmp_path), "--rank", "4", "--no-verdict"])
    assert result.exit_code == 0, result.output
    assert made["settings"] == Settings(concept="zappy", rank=4)


@pytest.fixture
def small(settings):
    return replace(settings, unsafe_prompts=6, benign_prompts=6, steps=2)


def stages_run(model, settings, out):
    ran = []
    recipe.Recipe(model, settings, out, lambda stage, done, total: ran.append(stage)).train()
    return [stage for stage in dict.fromkeys(ran) if ran.count(stage) > 1]


def test_recipe_leaves_every_product_and_reuses_stages(model, small, tmp_path):
    assert stages_run(model, small, tmp_path) == ["extract", "latents", "train"], "they report progress while they run"
    products = {"prompts.jsonl", "statistics.safetensors", "heads.csv", "heads.safetensors", "head_map.png"}
    products |= {"latents.safetensors", "train_state.safetensors"}
    products |= {"log.jsonl", "losses.png", "star.safetensors", "config.json", "stages.json", "lock", "pace.json"}
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
        recipe.Recipe(model, replace(small, cut=2.0), tmp_path).heads()
    with pytest.raises(ValueError, match="no head"):
        recipe.Recipe(model, replace(small, cut=2.0), tmp_path).train()
    assert recipe.Recipe(model, small, tmp_path).train().is_file()


def test_losses_go_to_tensorboard(monkeypatch, model, small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("saferope_training.flux.loading.load_model", lambda *_: model)
    few = [
        "--no-verdict",
        "--unsafe-prompts",
        "6",
        "--benign-prompts",
        "6",
        "--steps",
        "4",
        "--phase",
        "2",
        "--batch",
        "2",
    ]
    narrow = [
        "--rank",
        "3",
        "--padding-rank",
        "1",
        "--words-rank",
        "1",
        "--reach",
        "2",
        "--image-rank",
        "2",
        "--cut",
        "-1",
    ]
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path), *few, *narrow, "--tensorboard"])
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("unlearn/velocity_mse")] == [0, 1]
    assert [event.step for event in events.Scalars("preserve/velocity_mse")] == [2, 3]


def test_calibration_leaves_the_trained_file_alone(model, small, tmp_path):
    (tmp_path / "star.safetensors").write_bytes(b"trained")
    with torch.inference_mode():  # a gradient would raise here
        path = recipe.Recipe(model, replace(small, acts_on="k", fit=0), tmp_path).calibrate()
    (concept,) = load_concepts(path)
    assert (concept.mode, concept.text.acts_on, concept.slug, concept.reach) == ("fixed", "k", "star", 2)
    single = concept.heads[:, 0] == 1
    assert concept.text.generator.any() and concept.image.generator[single].any()
    assert not concept.image.generator[~single].any()
    (rand,) = load_concepts(recipe.Recipe(model, replace(small, generator="random"), tmp_path).calibrate())
    assert rand.mode == "random" and not torch.equal(rand.text.generator, concept.text.generator)
    (fitted,) = load_concepts(recipe.Recipe(model, replace(small, acts_on="k", fit=2), tmp_path).calibrate())
    assert fitted.mode == "learned" and fitted.training["instead"] == ["circle"]
    assert (fitted.text.generator - concept.text.generator).abs().max() > 0.05
    assert (tmp_path / "star.safetensors").read_bytes() == b"trained"


def test_a_missing_file_is_told_without_an_errno(tmp_path):
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 2
    assert result.output.strip() == f"saferope: {tmp_path}/none.safetensors: got no such file or folder; check the path"


def test_a_reader_that_leaves_is_no_error():
    """As in `saferope inspect FILE | head -1`."""
    star = ROOT / "tinyworld" / "concepts" / "star.safetensors"
    command = f"{sys.executable} -u -m saferope inspect {star} {'' if sys.platform == 'win32' else '| true'}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr
