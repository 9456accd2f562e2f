"""Stages whose products stay on disk and are made again only when something they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saferope_core.files import placed, sweep, write_text

from . import processes
from .settings import Settings, settings_of

Progress = Callable[[str, int, int], None]  # stage, done, total

RECORD, LOCK = "stages.json", "lock"
TENSORS = ".safetensors"
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
        make: Callable[[Callable[[int, int], None]], None],
        weights: str = "",
    ) -> None:
        """Calls `make(report)` unless all products are there, whole, and were made from these very inputs.

        Tensors that are not as they were left are made again; prompts and tables may be edited. Inputs are the settings
        of the stage, the bytes of the files `sources` and `weights`, a digest of the base model where it matters.
        `report(done, total)` passes progress on. A stage that fails leaves no record, so that it runs again.
        """
        processes.wait()
        inputs = self.digest(name, sources, weights)
        record = self._record()
        fresh = all((self.out / product).is_file() for product in products) and (
            record.get(name)
            in (inputs, {"inputs": inputs, **self._digests(products)})  # alone: as earlier versions wrote it
        )
        processes.wait()  # all have looked before one of them writes
        if not fresh:
            self._write({key: value for key, value in record.items() if key != name})
            make(lambda done, total: self.progress(name, done, total))
            processes.wait()
            self._write({**self._record(), name: {"inputs": inputs, **self._digests(products)}})
        self.progress(name, 1, 1)

    def digest(self, name: str, sources: Sequence[str], weights: str = "") -> str:
        """sha256 of all that decides the products of a stage."""
        inputs = {
            "settings": {key: getattr(self.settings, key) for key in settings_of(name)},
            "sources": {source: file_sha256(self.out / source) for source in sources},
            "weights": weights,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _digests(self, products: Sequence[str]) -> dict[str, str]:
        """sha256 of the products that nobody edits."""
        return {product: file_sha256(self.out / product) for product in products if product.endswith(TENSORS)}

    def _record(self) -> dict:
        try:
            return dict(json.loads((self.out / RECORD).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # none yet, or cut off: then everything is made again
            return {}

    def _write(self, record: dict) -> None:
        if processes.is_main():
            write_text(self.out / RECORD, json.dumps(record, indent=2) + "\n")


@contextmanager
def alone(out: Path, within: bool = False) -> Iterator[None]:
    """Makes the folder this process's own, or that of the processes that share its work. ValueError where it is another's.

    within: nothing to do for a caller that has made it its own already. The system gives the lock back when its process
    ends, however it ends; the empty file stays. What killed writes left in the folder is removed.
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
            f"{out}: got a folder that another saferope works in, expected one at a time; wait for it, or name another --out"
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


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
