"""Stages whose products stay on disk and are made again only when something they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferope_core import sha256
from saferope_core.concept.files import placed, sweep, write_text

from . import processes
from .console import say
from .settings import Settings, deciding

Progress = Callable[[str, int, int], None]  # stage, done, total
Report = Callable[[int, int], None]  # done, total
Facts = Mapping[str, object]  # JSON values by name

RECORD, LOCK = "stages.json", "lock"
# Of a stage in the record: a digest of its inputs, and the inputs, for people
INPUTS, MADE_FROM = "inputs", "made_from"
TENSORS = ".safetensors"
_HEX = 64  # characters of a sha256, which is not shown
_OWN: ContextVar[frozenset[Path]] = ContextVar("own", default=frozenset())  # folders that the caller, a thread, locked


@dataclass(frozen=True)
class Workplace:
    """A folder of products and the settings they are made with. Processes share it; one of them writes."""

    out: Path
    settings: Settings
    progress: Progress = lambda stage, done, total: None

    def stage(
        self,
        name: str,
        sources: Sequence[str],
        products: Sequence[str],
        make: Callable[[Report], None],
        facts: Facts | None = None,
        goes_on: bool = False,
    ) -> None:
        """Calls `make(report)` unless the stage is `fresh`; says why where its products have been there before.

        `goes_on`: `make` resumes from a state of the same run, so nothing is made again. `report(done, total)` passes
        progress on. A stage that fails leaves no record, so that it runs again.
        """
        processes.wait()
        inputs = self.inputs(name, sources, facts)
        record = self.record()
        reason = self._stale(record.get(name), inputs, products)
        processes.wait()  # all have looked before one of them writes
        if reason is not None:
            if reason and processes.is_main():
                say(f"{name}: {'resumes' if goes_on else 'made again'}, since {reason}", err=True)
            self._write({key: value for key, value in record.items() if key != name})
            make(lambda done, total: self.progress(name, done, total))
            processes.wait()
            entry = {INPUTS: sha256_of(inputs), **self._digests(products), MADE_FROM: inputs}
            self._write({**self.record(), name: entry})
        self.progress(name, 1, 1)

    def fresh(self, name: str, sources: Sequence[str], products: Sequence[str], facts: Facts | None = None) -> bool:
        """Whether all products are there, whole, and were made from these very inputs.

        Tensors that are not as they were left are made again; prompts and tables may be edited.
        """
        return self._stale(self.record().get(name), self.inputs(name, sources, facts), products) is None

    def changes(self, name: str, sources: Sequence[str], facts: Facts | None = None) -> str | None:
        """The inputs of a stage that changed since it was made, in words; None where none did, or none is known."""
        entry = self.record().get(name)
        return _changes(entry, self.inputs(name, sources, facts)) if isinstance(entry, dict) else None

    def inputs(self, name: str, sources: Sequence[str], facts: Facts | None = None) -> dict[str, object]:
        """All that decides the products of a stage, for JSON.

        The settings of the stage, the bytes of the files `sources`, and `facts` of all else: of the base model, say.
        """
        return {
            "settings": {key: getattr(self.settings, key) for key in deciding(name)},
            "sources": {source: sha256(self.out / source) for source in sources},
            "weights": facts or "",
        }

    def _stale(self, entry: object, inputs: dict[str, object], products: Sequence[str]) -> str | None:
        """Why a stage is to be made again; "" where nothing is known of products from before; None where it is not."""
        if entry is None:
            return ""
        known = dict(entry) if isinstance(entry, dict) else {INPUTS: entry}  # alone: as earlier versions wrote it
        if changed := _changes(known, inputs):
            return changed
        known.pop(MADE_FROM, None)
        if lost := [product for product in products if not (self.out / product).is_file()]:
            return f"{', '.join(lost)} is gone"
        return None if known == {INPUTS: known[INPUTS], **self._digests(products)} else "its tensors are damaged"

    def _digests(self, products: Sequence[str]) -> dict[str, str]:
        """sha256 of the products that users do not edit."""
        return {product: sha256(self.out / product) for product in products if product.endswith(TENSORS)}

    def record(self) -> dict:
        """By stage, a digest of its inputs and products, and its inputs."""
        try:
            return dict(json.loads((self.out / RECORD).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # none yet, or cut off: then everything is made again
            return {}

    def _write(self, record: dict) -> None:
        if processes.is_main():
            write_text(self.out / RECORD, json.dumps(record, indent=2) + "\n")


def _changes(entry: dict, now: dict) -> str | None:
    """The inputs that differ from an entry of the record, in words; None where none does."""
    if entry.get(INPUTS) == sha256_of(now):
        return None
    before = entry.get(MADE_FROM)
    if not isinstance(before, dict):
        return "an earlier version of saferope made it, which did not note all that it was made from"
    old, new = _flat(before), _flat(now)
    return "; ".join(_change(name, old, new) for name in {**old, **new} if old.get(name) != new.get(name))


def _flat(inputs: dict) -> dict[str, str]:
    """Name -> value, as JSON, of settings, files and facts."""
    parts = (part.items() for part in inputs.values() if isinstance(part, dict))
    return {name: json.dumps(value) for part in parts for name, value in part}


def _change(name: str, old: dict[str, str], new: dict[str, str]) -> str:
    values = (old.get(name, "absent"), new.get(name, "absent"))
    return f"{name} changed" if max(map(len, values)) > _HEX else f"{name} was {values[0]} and is {values[1]}"


@contextmanager
def alone(out: Path, within: bool = False) -> Iterator[None]:
    """Locks the folder for this run's processes. ValueError where another run has it.

    within: do nothing for a caller that has locked the folder already. The system frees the lock when its process ends,
    also when it is killed; the empty file stays. Leftovers of killed writes in the folder are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder, own = out.resolve(), _OWN.get()
    if not processes.is_main() or (within and folder in own):
        yield
        return
    if (out / LOCK).is_symlink():
        (out / LOCK).unlink()  # older releases of filelock empty the file that a link leads to
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{out}: got a folder that another saferope works in, expected one at a time; wait for it, or name "
            "another --out"
        ) from None
    before = _OWN.set(own | {folder})
    try:
        sweep(out)
        yield
    finally:
        _OWN.reset(before)
        lock.release()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors, the old file or the new one. OSError where the disk is full, as for any other file."""
    try:
        with placed(path) as new:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}); is the disk full?") from error


def load_tensors(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """All tensors of a product. ValueError where one of `shapes` is missing, or of another size; None: of any."""
    tensors = load_file(path)
    for name, expected in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or not _fits(found, expected):
            wanted = tuple("any" if size is None else size for size in expected)
            raise ValueError(
                f"{path}: got {name} {'missing' if found is None else found}, expected {wanted}: it was made with "
                "another model, other prompts or another version; delete it, and it is made again"
            )
    return tensors


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(b in (a, None) for a, b in zip(found, expected, strict=True))


def sha256_of(value: object) -> str:
    """Hex digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
