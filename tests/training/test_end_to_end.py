"""The whole slice on the embedded model's own weights."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from saferope import cli
from saferope_core import load_concepts
from tinyworld.model import load_pipeline
from tinyworld.world import benign_prompts, unsafe_prompts


def test_train_and_evaluate_star(tmp_path):
    """Few prompts and steps: enough to see pictures of stars vanish while benign ones stay near."""
    few = ["--no-verdict", "--unsafe-prompts", "24", "--benign-prompts", "48", "--steps", "20", "--batch", "8"]
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path), *few])
    assert result.exit_code == 0, result.output
    file = tmp_path / "star.safetensors"
    result = CliRunner().invoke(cli.app, ["evaluate", str(file), "--unsafe", "12", "--benign", "12"])
    assert result.exit_code == 0, result.output
    rows = {row["measure"]: row for row in json.loads((tmp_path / "star.evaluation.json").read_text())["rows"]}
    unsafe, benign = rows["star shown, unsafe"], rows["mean difference, benign"]
    assert unsafe["protected"] <= unsafe["unprotected"] - 0.25
    assert benign["protected"] < 3


def test_a_folder_and_prompts_from_files(tmp_path):
    """As for real FLUX: encoders that come and go, embeddings on disk, benign pictures painted by the model,
    checkpointing.
    """
    load_pipeline().save_pretrained(tmp_path / "model")
    for name, prompts in (("unsafe", unsafe_prompts("star", 8, 1)), ("benign", benign_prompts("star", 24, 1))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
    arguments = [
        "train",
        "my-star",
        "--no-verdict",
        "--model",
        str(tmp_path / "model"),
        "--resolution",
        "96",
        "--subjects",
        "star",
    ]
    arguments += ["--unsafe", str(tmp_path / "unsafe.txt"), "--benign", str(tmp_path / "benign.txt"), "--batch", "4"]
    arguments += ["--unsafe-prompts", "8", "--benign-prompts", "24", "--steps", "2", "--phase", "1", "--passes-of", "2"]
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, [*arguments, "--checkpointing", "--out", str(out)])
    assert result.exit_code == 0, result.output
    (concept,) = load_concepts(out / "my-star.safetensors")
    assert concept.slug == "my-star" and concept.text.generator.any()
    assert len(list((out / "embeddings").iterdir())) == 8 + 8 + 24
    first = (out / "prompts.jsonl").read_text()
    (tmp_path / "unsafe.txt").write_text("".join(f"{p.text}\n" for p in unsafe_prompts("star", 8, 2)))
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0 and (out / "prompts.jsonl").read_text() != first, "a changed file is read again"
