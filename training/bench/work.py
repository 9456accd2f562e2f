"""What the rest costs: files, extraction, training steps and starting up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from saferope_core import DOUBLE, FLUX1, SINGLE, CriticalHeads, Gathering, Protection, load_concepts, save_concepts

from ..attach import attached, listening, positioned
from ..losses import velocity_matching_loss
from ..models import Model, encode, seeded_noise, text_tokens, velocity
from ..rotation import TrainableRotation
from .rotation import Size, concept_of, gate_of
from .timing import Row, in_turns, ratio, spread

_PROMPTS, _SUBJECT = 8, (6, 10)  # "a red star , center" and its concept's characters
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


def tiny_rows(model: Model, repeats: int) -> Iterator[Row]:
    """Extraction and training in the tiny world."""
    texts = ["a red star , center"] * _PROMPTS
    text, x, t = encode(model, texts), seeded_noise(model, range(_PROMPTS)), torch.ones(_PROMPTS)
    yield from _extraction_rows(model, texts, text, x, t, repeats)
    step, least = _steps(model, text, x, t)
    taken = in_turns({"step": step, "least": least}, repeats)
    value, width = ratio(taken["step"], taken["least"])
    yield Row("training step / two forward passes and one backward", value, "x", 1.1, spread=width, note="tiny world")


def _extraction_rows(model: Model, texts: list[str], text, x: Tensor, t: Tensor, repeats: int) -> Iterator[Row]:
    gathering = Gathering(model.geometry, 64, model.device)
    visit = gathering.visit(
        "unsafe", text_tokens(model, texts, [_SUBJECT] * _PROMPTS), len(model.image_ids), range(_PROMPTS)
    )
    rope = positioned(model.transformer, model.image_ids)

    def gather(x: Tensor, *where) -> None:
        visit.listen(x, rope(x, *where[-2:]), *where)

    @torch.no_grad()
    def forward(listen: Callable | None = None) -> None:
        visit.at_time()
        with listening(model.transformer, listen) if listen else nullcontext():
            velocity(model, x, t, text)

    forms = {"plain": forward, "hooks": lambda: forward(lambda *_: None), "gather": lambda: forward(gather)}
    taken = in_turns(forms, repeats)
    value, width = ratio(taken["hooks"], taken["plain"])
    yield Row("extraction: forward with hooks / without", value, "x", 1.05, spread=width, note="tiny world")
    added = [a - b for a, b in zip(taken["gather"], taken["hooks"], strict=True)]
    value, width = ratio(added, taken["hooks"])
    yield Row("what gathering adds / forward with hooks", value, "x", 0.05, spread=width, note="tiny world")


def _steps(model: Model, text, x: Tensor, t: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of all heads, and what no step can do without: a pass without and one with gradients, and back."""
    geometry, width = model.geometry, 5
    codes = ((DOUBLE, geometry.double_blocks), (SINGLE, geometry.single_blocks))
    places = [
        (code, block, head) for code, blocks in codes for block in range(blocks) for head in range(geometry.heads)
    ]
    bases = torch.linalg.qr(torch.randn(len(places), geometry.head_dim, width)).Q
    gates = torch.full((len(places),), gate_of(geometry.head_dim, width))
    heads = CriticalHeads(torch.tensor(places), dict.fromkeys("qk", bases), dict.fromkeys("qk", gates), torch.ones(0))
    weights = [torch.randn(len(places), width, width).requires_grad_() for _ in range(2)]
    rotation = TrainableRotation(heads, geometry, {"text": "qk", "image": "qk"}, *weights)
    optimiser, nothing = torch.optim.AdamW(weights, 1e-6), torch.zeros((), requires_grad=True)

    def step(rotate: Callable) -> None:
        optimiser.zero_grad()
        with torch.no_grad():
            base = velocity(model, x, t, text)
        with attached(model.transformer, rotate):
            velocity_matching_loss(velocity(model, x, t, text), base).mean().backward()
        optimiser.step()

    return lambda: step(rotation.rotate), lambda: step(lambda x, *_: x + nothing)


def start_rows(repeats: int) -> Iterator[Row]:
    """Fresh processes: the help of the command, and what importing the pack's core adds to a process that has torch."""
    here = Path(__file__).resolve().parents[1]
    called = [sys.executable, "-m", here.name if here.name == "training" else __package__.partition(".")[0], "--help"]

    def run(command: list[str]) -> str:
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True, timeout=120).stdout

    taken = in_turns({"help": lambda: run(called)}, repeats)["help"]
    yield Row("saferope --help", median(taken), "s", 0.5, spread=spread(taken))
    code = "import time, torch, safetensors.torch; a = time.perf_counter(); import saferope_core; print(time.perf_counter() - a)"
    imports = [float(run([sys.executable, "-c", code])) for _ in range(repeats)]
    note = "ComfyUI has loaded torch by then; the nodes' own files need a ComfyUI to import"
    yield Row("import of the pack's core", median(imports), "s", 0.3, spread=spread(imports), note=note)


def not_here() -> Iterator[Row]:
    """Rows of the goals that no machine without a GPU can run."""
    why = "not measured: no GPU here" if not torch.cuda.is_available() else "not measured: this command times CPUs"
    yield Row("whole step on a GPU, a third of the heads critical, eager", None, "x", 1.01, note=why)
    yield Row("the same, compiled", None, "x", 1.005, note=why)
