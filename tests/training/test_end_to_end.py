"""The whole slice on the embedded model's own weights."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from training import cli


def test_train_and_evaluate_star(tmp_path):
    """Few prompts and steps: enough to see pictures of stars vanish while benign ones stay near."""
    few = ["--unsafe-prompts", "24", "--benign-prompts", "48", "--steps", "20", "--batch", "8"]
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path), *few])
    assert result.exit_code == 0, result.output
    file = tmp_path / "star.safetensors"
    result = CliRunner().invoke(cli.app, ["evaluate", str(file), "--unsafe", "12", "--benign", "12"])
    assert result.exit_code == 0, result.output
    rows = {row["measure"]: row for row in json.loads((tmp_path / "star.evaluation.json").read_text())["rows"]}
    unsafe, benign = rows["star shown, unsafe"], rows["mean difference, benign"]
    assert unsafe["protected"] <= unsafe["unprotected"] - 0.25
    assert benign["protected"] < 3
