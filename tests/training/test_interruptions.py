"""Real processes: killed in the middle, two side by side, a disk that is full. Nothing is lost, nothing is half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from saferope_core import load_concepts
from training import cli

ROOT = Path(__file__).parents[2]
FEW = [
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


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "training", "train", "star", "--out", str(out), *FEW, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def finish(out: Path, *more: str) -> None:
    done = subprocess.run(command(out, *more), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    finish(out)
    return out


def generators(out: Path) -> list[torch.Tensor]:
    (concept,) = load_concepts(out / "star.safetensors")
    return [concept.generator_text, concept.generator_image]


@pytest.mark.parametrize("sign", ["stages.json", "train_state.safetensors"])
def test_killed_and_called_again_it_ends_the_same(undisturbed, tmp_path, sign):
    """SIGKILL soon after a file appears: in extraction, in training."""
    process = subprocess.Popen(command(tmp_path), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600  # half a minute on an idle machine
    while not (tmp_path / sign).exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "star.safetensors").exists(), "killed before the end, or this shows nothing"
    finish(tmp_path)
    for a, b in zip(generators(tmp_path), generators(undisturbed), strict=True):
        assert torch.equal(a, b), "bit for bit"
    assert (tmp_path / "log.jsonl").read_text() == (undisturbed / "log.jsonl").read_text()
    assert not list(tmp_path.glob(".*")), "no partial file is left"


def test_ctrl_c_says_how_to_go_on(tmp_path):
    # where the tests run in the background, SIGINT is ignored, and so it would be in the process
    terminal = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(
        command(tmp_path), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, **terminal
    )
    until = time.monotonic() + 600  # half a minute on an idle machine
    while not (tmp_path / "train_state.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what is done is kept" in " ".join(told.split()) and "Traceback" not in told


def test_two_processes_make_what_one_makes(undisturbed, tmp_path):
    """The same bases to 1e-5 and the same loss curve to 1e-4: every batch is shared, none is doubled."""
    # accelerate's own launcher starts one process alone where there is no GPU
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "training"]
    arguments = [*launch, *command(tmp_path)[3:]]
    two = environment() | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(arguments, env=two, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = (load_file(out / "heads.safetensors") for out in (tmp_path, undisturbed))
    assert torch.equal(here["heads"], there["heads"])
    for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k"):
        same = torch.linalg.svdvals(here[name].double().mT @ there[name].double())
        assert (1 - same).abs().max() < 1e-5, name
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (tmp_path, undisturbed)]
    assert len(logs[0]) == len(logs[1]) == 8
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["phase"]) == (b["step"], b["phase"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", ["statistics", "latents", "train_state", "concept"])
def test_a_full_disk_is_told_and_nothing_is_half_written(undisturbed, tmp_path, monkeypatch, stage):
    import errno

    from training import stages

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
        monkeypatch.setattr("saferope_core.concept_file.os.fsync", full)
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
