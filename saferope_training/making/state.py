"""A training on disk: the state that it resumes from, and the log of its steps."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saferope_core.concept.files import append_text, write_text

from .. import processes
from ..stages import save_tensors


class State:
    """Weights, AdamW's moments and the number of finished steps in one file, written whole after every step.

    `inputs` is a digest of all inputs of the run but its number of steps. A state of other inputs is ignored, and so is
    one of more steps than are asked for. A damaged state is ignored with a warning.

    Learning rates fall with the steps asked for. If this number changed, `courses` has each one by the step from which
    on it held: {"0": 180, "180": 300}.
    """

    def __init__(self, path: Path | None, inputs: str = "") -> None:
        self.path, self.inputs = path, inputs
        self._courses: dict[str, int] = {}

    def finished(self, steps: int | None = None) -> int:
        """How many steps of these inputs are done, of `steps` in all; None: of any number."""
        return self._read(steps)[0]

    def courses(self, steps: int) -> dict[str, int]:
        """First step -> steps asked for from there on; `steps` are asked for now."""
        done, _, before = self._read(steps)
        if done == 0 or not before:
            return {"0": steps}
        return before if list(before.values())[-1] == steps else {**before, str(done): steps}

    def _read(self, steps: int | None = None) -> tuple[int, dict[str, Tensor], dict[str, int]]:
        """Finished steps of these inputs, the tensors after them and their courses; 0 and none where they cannot be
        trusted."""
        facts, tensors = {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                facts, tensors = dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, TypeError):  # none yet, or no path
            return 0, {}, {}
        except (SafetensorError, OSError):
            pass
        if facts.pop("sha256", "") != _sha256(tensors, facts):
            told = f"{self.path}: got a damaged training state, expected it as it was saved; training starts again"
            warnings.warn(told, stacklevel=2)
            return 0, {}, {}
        done = int(facts["step"])
        if facts["inputs"] != self.inputs or (steps is not None and done > steps):
            return 0, {}, {}
        return done, tensors, json.loads(facts.get("courses", "{}"))

    def load(self, weights: dict[str, Tensor], optimiser: torch.optim.Optimizer, steps: int | None = None) -> int:
        """Takes over the saved weights and moments, if there are any; returns the number of finished steps."""
        done, tensors, _ = self._read(steps)
        self._courses = {} if steps is None else self.courses(steps)
        if done == 0:
            return 0
        for name, weight in weights.items():
            with torch.no_grad():
                weight.copy_(tensors[name])
            optimiser.state[weight] = {
                key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else weight.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{key}" in tensors
            }
        return done

    def save(self, step: int, weights: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Writes the state after `step` finished steps; the file is the old one or the new one, never half of it."""
        if self.path is None or not processes.is_main():
            return
        tensors = {name: weight.detach().cpu() for name, weight in weights.items()}
        for name, weight in weights.items():
            tensors |= {f"{name}.{key}": value.detach().cpu() for key, value in optimiser.state.get(weight, {}).items()}
        facts = {"inputs": self.inputs, "step": str(step), "courses": json.dumps(self._courses)}
        save_tensors(self.path, tensors, facts | {"sha256": _sha256(tensors, facts)})


def _sha256(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """Hex digest of every name, shape and number, so that a flipped bit does not reach the result."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Log:
    """Entries as JSON lines. Only the first `finished` entries of an old file stay: the other steps run again."""

    def __init__(self, path: Path, finished: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines()[:finished] if path.is_file() else []
        self.entries = [json.loads(line) for line in lines]
        if processes.is_main():
            write_text(path, "".join(f"{line}\n" for line in lines))

    def add(self, entry: dict) -> None:
        """Appends an entry, here and on disk."""
        self.entries.append(entry)
        if processes.is_main():
            append_text(self.path, json.dumps(entry) + "\n")
