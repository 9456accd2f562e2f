"""Real processes: killed in the middle, two side by side, a disk that is full. Nothing is lost, nothing is
half-written.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from saferope import cli
from saferope_core import load_concepts
from tests.support import warm

FEW = [
    "--no-verdict",
    "--unsafe-prompts",
    "16",
    "--benign-prompts",
    "24",
    "--steps",
    "8",
    "--batch",
    "4",
    "--phase",
    "2",
    "--passes-of",
    "2",
]


DYING = Path(__file__).parents[1] / "support" / "dying.py"


def train(out: Path) -> list[str]:
    return ["train", "star", "--out", str(out), *FEW]


def finish(out: Path) -> None:
    """To its end, in a process of its own."""
    said = out.with_suffix(".said")
    warm.ended(warm.start(train(out), said), said)


def interrupted(out: Path, place: str, call: int, sign: signal.Signals, code: int) -> str:
    """All that a process says to which `sign` happens at a call of the function; it ends with `code`."""
    said = out.with_suffix(".said")
    return warm.ended(warm.start([place, str(call), sign.name, *train(out)], said, DYING), said, code)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    finish(out)
    return out


def generators(out: Path) -> list[torch.Tensor]:
    (concept,) = load_concepts(out / "star.safetensors")
    return [concept.text.generator, concept.image.generator]


@pytest.mark.parametrize("call", ["extract._visit 2", "train._gradients 4"], ids=["in extraction", "in training"])
def test_killed_and_called_again_it_ends_the_same(undisturbed, tmp_path, call):
    """By SIGKILL, between the first prompts' statistics and the others', and after three of eight steps."""
    function, number = call.split()
    interrupted(tmp_path, f"saferope_training.making.{function}", int(number), signal.SIGKILL, -signal.SIGKILL)
    assert not (tmp_path / "star.safetensors").exists()
    finish(tmp_path)
    for a, b in zip(generators(tmp_path), generators(undisturbed), strict=True):
        assert torch.equal(a, b), "bit for bit"
    assert (tmp_path / "log.jsonl").read_text() == (undisturbed / "log.jsonl").read_text()
    assert not list(tmp_path.glob(".*")), "no partial file is left"


def test_ctrl_c_says_how_to_go_on(tmp_path):
    told = interrupted(tmp_path, "saferope_training.making.train._gradients", 2, signal.SIGINT, 130)
    assert "interrupted; finished work is kept" in " ".join(told.split()) and "Traceback" not in told


# Of what two processes make, where every half of a batch goes through the network in another shape: bf16 keeps 8 bits,
# so that a number is off by 2⁻⁹, and a sum over a network's few dozen products by less than 2⁻⁹ √50. A loss also sees a
# token lifted over its gate. Half of the work, or all of it twice, is 50 % off. Later steps cannot be compared: AdamW's
# first ones go by the sign of a gradient, however small.
HALVES, LOSS = 0.014, 0.25


def test_two_processes_make_what_one_makes(undisturbed, tmp_path):
    """The same heads, statistics and first loss. That shares of a batch add up is shown in test_train.py."""
    said = tmp_path.with_suffix(".said")
    for number, process in enumerate(warm.start_several(2, train(tmp_path), said)):
        warm.ended(process, said.with_suffix(f".{number}"))
    here, there = (load_file(out / "heads.safetensors") for out in (tmp_path, undisturbed))
    assert torch.equal(here["heads"], there["heads"]), (
        "all tell: the least Δ is 0.99, far from where heads are left out"
    )
    here, there = (load_file(out / "statistics.safetensors") for out in (tmp_path, undisturbed))
    for name in (name for name in there if "gram" in name):
        assert (here[name] - there[name]).norm() <= HALVES * there[name].norm(), name
        assert there[name].norm() > 0
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (tmp_path, undisturbed)]
    steps = [[(entry["step"], entry["phase"]) for entry in log] for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) == 8
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=LOSS)


@pytest.mark.parametrize("stage", ["statistics", "latents", "train_state", "concept"])
def test_a_full_disk_is_told_and_nothing_is_half_written(undisturbed, tmp_path, monkeypatch, stage):
    import errno

    from saferope_training import stages

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_file(tensors, path, *more):
        if stage in str(path):
            Path(path).write_bytes(b"half")
            full()
        return real(tensors, path, *more)

    real = stages.save_file
    monkeypatch.setattr(stages, "save_file", save_file)
    if stage == "concept":
        monkeypatch.setattr("saferope_core.concept.concept_file.os.fsync", full)
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path), *FEW])
    assert result.exit_code == 2 and "No space left on device" in result.output, result.output
    names = {"statistics": "statistics.safetensors", "latents": "latents.safetensors", "concept": "star.safetensors"}
    assert not (tmp_path / names.get(stage, "train_state.safetensors")).exists()
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path), *FEW])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", "/nowhere"], "no folder with a model_index.json"),
        (["--unsafe", "none.txt"], "none.txt"),
        (["--quantise", "int3"], "expected one of nf4"),
        (["--timesteps", "0.5,1"], "expected falling numbers"),
        (["--timesteps", "a"], "expected numbers with commas between"),
        (["--sharing", "shared"], "expected 0 where generators are shared"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, told):
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2 and told in " ".join(result.output.replace("│", " ").split()), result.output
    assert "Traceback" not in result.output
    left = list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else []
    assert {path.name for path in left} <= {"config.json", "lock", "stages.json"}
