"""Faults around a training: two in one folder, a folder that cannot be written, damaged files, a clock that goes back,
a worker that dies. Refused in one clear line, or mended to the same end. Kills and full disks are in
test_interruptions.py; `python -m tests.support.faults` kills at random moments.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from saferope import cli
from saferope.commands.common import told as in_a_line
from saferope_core import load_concepts
from saferope_training.flux.encoders import EmbeddingCache
from saferope_training.making.recipe import Recipe
from saferope_training.settings import TRAIN, Settings
from saferope_training.stages import LOCK, RECORD, alone, save_tensors

ROOT = Path(__file__).parents[2]
DYING = Path(__file__).parents[1] / "support" / "dying.py"
PATIENCE = 1800  # seconds: half a minute is usual; only a process that hangs is to be ended
FEW = ["--unsafe-prompts", "6", "--benign-prompts", "8", "--steps", "4", "--batch", "2", "--phase", "2"]
FEW += ["--no-verdict", "--reservoir", "256", "--unlearn-at", "1", "--timesteps", "1"]
SHARDS = ("statistics.safetensors", "heads.safetensors", "latents.safetensors")


def train(out: Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["train", "star", "--out", str(out), *FEW])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "star"
    assert train(out)[0] == 0
    return out


@pytest.fixture
def folder(finished, tmp_path):
    """A finished folder of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "star"))


def contents(out: Path) -> dict:
    """Every product's bytes, and the record of stages, in whatever order they ran; no record of seconds."""
    apart = (LOCK, "config.json", "pace.json")
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in apart}
    return found | {RECORD: json.loads(found[RECORD])}


def told(output: str) -> str:
    assert "Traceback" not in output
    return next(line for line in output.splitlines() if line.startswith("saferope: "))


@pytest.mark.parametrize(
    ("shard", "damage"), [(SHARDS[0], "a bit"), (SHARDS[1], "cut off"), (SHARDS[2], "a bit"), (SHARDS[2], "empty")]
)
def test_a_damaged_product_is_made_again_to_the_same_bytes(folder, shard, damage):
    """And what followed from it is not."""
    before, path = contents(folder), folder / shard
    data = bytearray(before[shard])
    data[-5] ^= 0x40
    path.write_bytes({"a bit": bytes(data), "cut off": before[shard][:-100], "empty": b""}[damage])
    trained = (folder / "star.safetensors").stat().st_mtime_ns
    code, output = train(folder)
    assert code == 0, output
    assert contents(folder) == before
    assert (folder / "star.safetensors").stat().st_mtime_ns == trained, "finished work is not done again"


OF_PROMPTS = ("concept", "seed", "unsafe", "subjects", "benign", "similarity_model", "similarity", "images")
OF_PROMPTS += ("unsafe_prompts", "benign_prompts")


@pytest.mark.parametrize("whole", [True, False], ids=["0.1.0", "before it"])
def test_a_folder_of_an_earlier_version_is_made_again_and_said_so(folder, whole):
    """Its record does not say which encoders and resolution it was made with, and its prompts have no stand-ins."""
    path, prompts = folder / "stages.json", folder / "prompts.jsonl"
    record = json.loads(path.read_text())
    settings = {name: getattr(Settings(unsafe_prompts=6, benign_prompts=8), name) for name in OF_PROMPTS}
    known = json.dumps({"settings": settings, "sources": {}, "weights": ""}, sort_keys=True)
    record["prompts"] = {"inputs": hashlib.sha256(known.encode()).hexdigest()}
    stages = ("prompts", "extract", "heads", "latents", "train")
    for name in stages[1:]:
        record[name] = {**record[name], "inputs": "0" * 64}
        del record[name]["made_from"]
    path.write_text(json.dumps(record if whole else {name: entry["inputs"] for name, entry in record.items()}))
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:-1]))
    made = {name: (folder / name).stat().st_mtime_ns for name in (*SHARDS, "star.safetensors")}
    code, output = train(folder)
    assert code == 0 and '"instead": "' in prompts.read_text()
    for name in stages:
        assert f"{name}: made again, since an earlier version of saferope made it" in output
    assert not any(made[name] == (folder / name).stat().st_mtime_ns for name in made)
    code, output = train(folder)
    assert code == 0 and "made again" not in output, "control: once"


@pytest.mark.parametrize("junk", [5, [], {}, None, {"inputs": 5, "made_from": 7}])
def test_a_record_of_junk_is_none(folder, junk):
    path = folder / "stages.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extract": junk}))
    before = contents(folder)[SHARDS[0]]
    assert train(folder)[0] == 0
    assert contents(folder)[SHARDS[0]] == before and json.loads(path.read_text())["extract"]["made_from"]


def test_prompts_edited_by_hand_are_kept(folder):
    path = folder / "prompts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert train(folder)[0] == 0
    assert len(path.read_text().splitlines()) == len(lines) - 1
    assert load_concepts(folder / "star.safetensors")


def test_the_second_in_a_folder_is_refused_in_a_line(folder):
    before = contents(folder)
    with alone(folder):
        code, output = train(folder)
    assert code == 2 and "another saferope works in, expected one at a time; wait for it, or name" in told(output)
    assert contents(folder) == before
    assert train(folder)[0] == 0, "and once it is free, it is free"


@pytest.mark.parametrize("stage", ["prompts", "train"])
def test_a_recipe_called_from_python_locks_its_folder_as_well(folder, stage):
    """While one is at work, a second of the same process is refused: before it writes, and in every stage."""
    before, refused = contents(folder), []

    def second(*_):
        with ThreadPoolExecutor() as threads:  # another caller of the same process
            for work in (getattr(idle, stage), lambda: Recipe(None, idle.settings, folder)):
                refused.append(str(threads.submit(work).exception()))

    idle = Recipe(None, Settings(), folder, goal=TRAIN)
    with alone(folder):
        Recipe(None, Settings(), folder, second, goal=TRAIN).prompts()  # whoever has locked it may go on
    assert len(refused) >= 2 and all("another saferope works in, expected one at a time" in told for told in refused)
    refused.clear()
    Recipe(None, Settings(), folder, second, goal=TRAIN).prompts()
    assert len(refused) >= 2 and all("another saferope works in, expected one at a time" in told for told in refused)
    assert {name: data for name, data in contents(folder).items() if name in SHARDS} == {n: before[n] for n in SHARDS}
    assert idle.prompts(), "control: once it is free, it is free"


def test_a_killed_process_holds_no_lock(folder):
    code = "from saferope_training.stages import alone\nfrom pathlib import Path\n"
    code += f"with alone(Path({str(folder)!r})): print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    assert train(folder)[0] == 2, "control: another process's lock is seen"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert train(folder)[0] == 0


def test_what_a_kill_amid_a_write_leaves_goes_with_the_next(tmp_path):
    """A killed write leaves a folder of a random name, which whoever next has the folder to itself removes."""
    path, tensors = tmp_path / "statistics.safetensors", {"x": torch.ones(1000)}
    child = os.fork()
    if child == 0:  # the system kills whoever writes the 2049th byte
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
            save_tensors(path, tensors)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    assert left != path and any(left.iterdir()), "negative control: something was left"
    with alone(tmp_path):
        save_tensors(path, tensors)
    assert {name.name for name in tmp_path.iterdir()} == {path.name, LOCK}
    assert torch.equal(load_file(path)["x"], tensors["x"])


@contextmanager
def full(size: int = 2048):
    """No file of this process can grow beyond `size` bytes: the system refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_the_cache_of_embeddings_is_told_in_a_line(tmp_path, capsys):
    """safetensors has an error of its own, which is no OSError and ended in a traceback."""
    cache, states, pooled = EmbeddingCache(tmp_path / "cache", "f", 24), torch.zeros(2, 24, 64), torch.zeros(2, 64)
    with full(), pytest.raises(SafetensorError):
        save_file({"states": states}, tmp_path / "negative control")
    with full(), pytest.raises(OSError, match=r"could not be written .*; is the disk full") as error:
        cache.write(["a", "b"], states, pooled)
    assert cache.read(["a"]) is None and not list(cache.folder.iterdir()), "nothing is half-written"
    with pytest.raises(typer.Exit), in_a_line():
        raise error.value
    assert str(cache.path("a")) in told(capsys.readouterr().err)
    cache.write(["a", "b"], states, pooled)
    assert cache.read(["a", "b"]) is not None


def test_a_folder_that_cannot_be_written_is_told_in_a_line():
    code, output = train(Path("/proc/saferope"))
    assert code == 2 and "/proc/saferope" in told(output)


def test_a_file_where_the_folder_should_be_is_told_in_a_line(tmp_path):
    (tmp_path / "star").write_text("mine")
    code, output = train(tmp_path / "star")
    assert code == 2 and "star" in told(output)
    assert (tmp_path / "star").read_text() == "mine"


def test_a_clock_that_goes_back_changes_nothing(folder, monkeypatch):
    """Nothing is decided by times: files from 2096, and a clock that goes back while it runs."""
    then = 4_000_000_000
    for path in folder.iterdir():
        os.utime(path, (then, then))
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    before = contents(folder)
    assert train(folder)[0] == 0
    assert contents(folder) == before
    assert {(folder / name).stat().st_mtime for name in (*SHARDS, "star.safetensors")} == {then}


@pytest.mark.slow  # PyTorch's own launcher, whose processes import everything for themselves
def test_a_worker_of_two_that_dies_ends_both_and_loses_nothing(tmp_path):
    """The launcher ends with an error instead of waiting for ever; the same command then goes on from the last step."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(DYING)]
    launch += [
        "saferope_training.making.train._gradients",
        "3",
        "SIGKILL",
        "train",
        "star",
        "--out",
        str(tmp_path),
        *FEW,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert not (tmp_path / "star.safetensors").exists()
    log = (tmp_path / "log.jsonl").read_text()
    assert len(log.splitlines()) == 2, "the step that the second died in is in no log"
    before = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    code, output = train(tmp_path)
    assert code == 0, output
    assert (tmp_path / "log.jsonl").read_text().startswith(log)
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
