"""Kills a training at random moments of every stage, and looks whether the same command then ends the same.

    python -m tests.support.faults --kills 50          # of each stage; a quarter of an hour

Each trial starts from a folder in which the stages before are done, waits for the stage to begin, kills (SIGKILL) after
a random share of the time that it takes undisturbed, checks that no file under a final name is half-written, and runs
to the end. Generators, log and every tensor file must then be those of the undisturbed run, bit for bit. Processes are
forked after the imports (Linux, macOS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from saferope_core import load_concepts
from saferope_training.flux.loading import load_model
from saferope_training.making.recipe import Recipe
from saferope_training.settings import Settings

STAGES = ("prompts", "extract", "heads", "latents", "train")
SMALL = {"unsafe_prompts": 6, "benign_prompts": 8, "steps": 6, "batch": 2, "phase": 2, "reservoir": 256}
SMALL |= {"unlearn_at": (1.0,), "timesteps": (1.0,)}
TENSORS = ("statistics.safetensors", "heads.safetensors", "latents.safetensors", "train_state.safetensors")


def forked(out: Path, model, until: str | None = None, delay: float = 0.0) -> tuple[bool, float]:
    """Trains in a process of its own. Killed `delay` seconds into the stage `until`, if it is still there.

    Returns whether it was killed, and how long that stage (or all) took.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            Recipe(model, Settings(**SMALL), out, lambda stage, *_: os.write(writer, f"{stage}\n".encode())).train()
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    begin = time.monotonic()
    if until is not None and STAGES.index(until) > 0:
        _wait_for(reader, STAGES[STAGES.index(until) - 1])
        begin = time.monotonic()
    if until is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reader)
    assert until is not None or status == 0, f"it ended with {status}"
    return os.WIFSIGNALED(status), time.monotonic() - begin


def _wait_for(reader: int, stage: str) -> None:
    """Until a stage has told that it is done, or the process has ended."""
    told = b""
    while f"{stage}\n".encode() not in told and (more := os.read(reader, 4096)):
        told += more


def check_whole(out: Path) -> None:
    """No file under a final name is half-written."""
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.keys() or file.metadata(), path
    for path in out.glob("*.json"):
        json.loads(path.read_text())


def products(out: Path) -> dict:
    """What must be the same again."""
    (concept,) = load_concepts(out / "star.safetensors")
    found = {name: (out / name).read_bytes() for name in ("prompts.jsonl", "log.jsonl", "heads.csv")}
    found |= {name: contents(out / name) for name in TENSORS}
    return found | {"generators": (concept.text.generator.numpy().tobytes(), concept.image.generator.numpy().tobytes())}


def contents(path: Path) -> tuple[dict, dict]:
    """Metadata and every tensor's bytes. Not the file's: safetensors writes metadata in a random order."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).contiguous().flatten() for name in sorted(file.keys())}
        return file.metadata() or {}, {name: x.view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}


def durations(out: Path, model) -> dict[str, float]:
    """Seconds of every stage of an undisturbed run."""
    last, found = time.monotonic(), Counter()

    def told(stage: str, *_) -> None:
        nonlocal last
        found[stage] += time.monotonic() - last
        last = time.monotonic()

    Recipe(model, Settings(**SMALL), out, told).train()
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance, model = random.Random(given.seed), load_model("tinyworld", "cpu", None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        seconds = durations(undisturbed, model)
        expected = products(undisturbed)
        for stage in given.stages:
            figures = Counter()
            while figures["killed"] < given.kills and figures["tried"] < 4 * given.kills:
                out = Path(folder) / "trial"
                killed, _ = forked(out, model, stage, chance.random() * seconds[stage])
                figures["tried"] += 1
                figures["killed"] += killed
                check_whole(out)
                figures["leftovers"] += len(list(out.glob(".*")))
                forked(out, model)
                figures["different"] += products(out) != expected
                figures["partial files left at the end"] += len(list(out.glob(".*")))
                shutil.rmtree(out)
            print(stage, json.dumps(figures), flush=True)
            if figures["different"] or figures["partial files left at the end"]:
                sys.exit(1)


if __name__ == "__main__":
    main()
