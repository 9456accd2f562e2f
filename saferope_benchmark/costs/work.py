"""The cost of the rest: files and starting up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from saferope_core import DOUBLE, FLUX1, SINGLE, Protection, load_concepts, save_concepts

from .rotation import Size, concept_of
from .timing import Row, in_turns, spread

_FILE_HEADS = 400


def file_rows(repeats: int) -> Iterator[Row]:
    """Size of a concept with 400 heads of FLUX.1, and the time until it protects."""
    places = [(DOUBLE, block, head) for block in range(FLUX1.double_blocks) for head in range(FLUX1.heads)]
    places += [(SINGLE, block, head) for block in range(FLUX1.single_blocks) for head in range(FLUX1.heads)]
    concept = concept_of(
        Size(), heads=torch.tensor(places[:: len(places) // _FILE_HEADS][:_FILE_HEADS]), geometry=FLUX1
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "concept.safetensors"
        save_concepts(path, [concept], torch.float16)
        yield Row(f"concept file, {_FILE_HEADS} heads, fp16", path.stat().st_size / 1e6, "MB", 1.1)
        x = torch.zeros(1, FLUX1.heads, 2, FLUX1.head_dim)

        def ready() -> None:
            Protection(load_concepts(path), FLUX1).rotate(x, "q", "single", 0, (0, 1), (1, 2))

        taken = [1e3 * each for each in in_turns({"ready": ready}, repeats)["ready"]]
    yield Row("loaded, checked and ready", median(taken), "ms", 60, spread=spread(taken))


def start_rows(repeats: int) -> Iterator[Row]:
    """Fresh processes: the help of the command, and the import of the pack's core in a process that has torch."""
    root = Path(__file__).resolve().parents[2]
    called = [sys.executable, "-m", "saferope", "--help"]

    def run(command: list[str]) -> str:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120).stdout

    taken = in_turns({"help": lambda: run(called)}, repeats)["help"]
    yield Row("saferope --help", median(taken), "s", 0.5, spread=spread(taken))
    code = "import time, torch, safetensors.torch; now = time.perf_counter; a = now(); "
    code += "import saferope_core; print(now() - a)"
    imports = [float(run([sys.executable, "-c", code])) for _ in range(repeats)]
    note = "ComfyUI has loaded torch by then; the nodes' own files need a ComfyUI to import"
    yield Row("import of the pack's core", median(imports), "s", 0.3, spread=spread(imports), note=note)


def not_here() -> Iterator[Row]:
    """Rows of the goals that no machine without a GPU can run."""
    why = "not measured: no GPU here" if not torch.cuda.is_available() else "not measured: --device cuda times GPUs"
    yield Row("whole step on a GPU, a third of the heads critical, eager", None, "x", 1.01, note=why)
    yield Row("the same, compiled", None, "x", 1.005, note=why)
